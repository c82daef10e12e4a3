"""A service's Prometheus metrics on a port of their own: what its collectors say whenever Prometheus asks."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from tutelage.errors import ConfigurationError
from tutelage.rpc.tls import ServerTls
from tutelage.rpc.transport import is_loopback


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing: Prometheus asks every few seconds."""


def serve_metrics(host: str, port: int, collector: Collector, tls: ServerTls | None = None) -> Callable[[], None]:
    """Answers on http://host:port/metrics from a thread, until the function that it returns is called.

    Beyond loopback by https with the service's own certificate, if it has one, and then to those alone whom `client_ca`
    lets in; the files are read once. It knows no tokens.

    Raises:
        ConfigurationError: the port is taken, the host is no address of this machine, or a file cannot be read.

    """
    registry = CollectorRegistry()
    registry.register(collector)
    in_either_form = make_wsgi_app(registry)

    def in_text(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        # In OpenMetrics, which Prometheus prefers, prometheus_client 0.26 calls `vllm:…` `vllm_…` (`_escape(s.name, …,
        # _is_legacy_labelname_rune)` in openmetrics/exposition.py), and no dashboard of vLLM's finds it.
        answer: Iterable[bytes] = in_either_form(environ | {"HTTP_ACCEPT": "text/plain"}, start_response)
        return answer

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        kind = type("MetricsServer", (ThreadingWSGIServer,), {"address_family": family})
        server: WSGIServer = make_server(host, port, in_text, kind, _Quiet)
        if tls is not None and not is_loopback(host):
            # Shaking hands in each request's thread: who connects and says nothing must not hold up the others.
            server.socket = _context(tls).wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    except OSError as error:
        raise ConfigurationError(f"cannot serve metrics at {host}:{port}: {error}", "metrics_port") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


def _context(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


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
