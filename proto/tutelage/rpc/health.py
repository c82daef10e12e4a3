"""Whether a server on this machine serves, as an exit code: `python -m tutelage.rpc.health 127.0.0.1:50061`.

For what starts containers and asks by a command; Kubernetes asks the port by itself.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_SECONDS = 3.0


def is_serving(address: str) -> bool:
    """Asks a server's `health_port`; one that does not answer does not serve."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(not is_serving(sys.argv[1]))
