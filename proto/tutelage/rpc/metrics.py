"""A service's Prometheus metrics on a port of their own: what its collectors say whenever Prometheus asks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tutelage.errors import ConfigurationError
from tutelage.rpc.tls import ServerTls
from tutelage.rpc.transport import is_loopback


def serve_metrics(host: str, port: int, collector: Collector, tls: ServerTls | None = None) -> Callable[[], None]:
    """Answers on http://host:port/metrics from a thread, until the function that it returns is called.

    Beyond loopback by https with the service's own certificate, if it has one, and then to those alone whom `client_ca`
    lets in; the files are read once. It knows no tokens.

    Raises:
        ConfigurationError: the port is taken, the host is no address of this machine, or a file cannot be read.

    """
    registry = CollectorRegistry()
    registry.register(collector)
    encrypted: dict[str, Any] = {}
    if tls is not None and not is_loopback(host):
        encrypted = {"certfile": str(tls.certificate), "keyfile": str(tls.key)}
        if tls.client_ca is not None:
            encrypted |= {"client_cafile": str(tls.client_ca), "client_auth_required": True}
    try:
        server, thread = start_http_server(port, addr=host, registry=registry, **encrypted)
    except OSError as error:
        raise ConfigurationError(f"cannot serve metrics at {host}:{port}: {error}", "metrics_port") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def disk_metrics(service: str, folders: Mapping[str, Path]) -> list[GaugeMetricFamily]:
    """How much room the file systems below a service's folders have; of those that are there.

    Args:
        service: its part of the metrics' names.
        folders: by the name that they have as a label.

    """
    free = GaugeMetricFamily(
        f"tutelage_{service}_disk_free_bytes", "Room left where this folder is.", labels=["folder"]
    )
    size = GaugeMetricFamily(
        f"tutelage_{service}_disk_size_bytes", "Size of the file system where this folder is.", labels=["folder"]
    )
    for name, path in folders.items():
        if path.exists():
            usage = shutil.disk_usage(path)
            free.add_metric([name], usage.free)
            size.add_metric([name], usage.total)
    return [free, size]
