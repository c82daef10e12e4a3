"""Both sides of every gRPC connection: message limits, keepalive, where to listen, TLS, errors as statuses.

A server binds to loopback unless it has a certificate or is told `insecure`.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2_grpc

from tutelage.errors import (
    ConfigurationError,
    NotAuthenticated,
    Overloaded,
    TutelageError,
    Unreachable,
    error_of_status,
)
from tutelage.files import require_writable
from tutelage.names import address_of, check_address
from tutelage.rpc.tls import ClientAccess, ClientTls, ServerTls
from tutelage.rpc.v1 import teacher_pb2 as pb

logger = logging.getLogger(__name__)

STUDENT_METADATA_KEY = "tutelage-student"
ADAPTER_METADATA_KEY = "tutelage-adapter"
INSTANCE_METADATA_KEY = "tutelage-instance"
TOKEN_METADATA_KEY, BEARER = "authorization", "Bearer "
MAX_MESSAGE_BYTES = 16 * 2**20

# A dead peer is noticed after keepalive_time + ping_timeout. Core ignores misspelt keys silently.
_COMMON_OPTIONS = [
    # gRPC's own limit for what is received is 4 MiB, less than the candidates of one long sequence.
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
]
CHANNEL_OPTIONS = [
    *_COMMON_OPTIONS,
    # 0 is as many as it takes: while a teacher computes no data flows, and gRPC would stop asking after two pings.
    ("grpc.http2.max_pings_without_data", 0),
    # By default the pauses grow to two minutes, for which a teacher that is back would be left alone.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # gRPC heeds http_proxy of the environment, and clusters often set it for the hub's sake.
    ("grpc.enable_http_proxy", 0),
]
SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    # Else the server takes its clients' keepalive for an attack, and ends connections with "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would each get some of the connections; the second is to fail instead.
    ("grpc.so_reuseport", 0),
]


_STATUS_BY_NUMBER = {code.value[0]: code.name for code in grpc.StatusCode}


_DNS = "dns:///"


@dataclass(frozen=True)
class Endpoint:
    """One server of possibly several."""

    address: str
    """host:port."""
    name: str = ""
    """The name that its certificate is for, if it is not the address's host."""


def endpoints(addresses: str | Sequence[str]) -> list[Endpoint]:
    """The servers behind host:port, a list of these, or dns:///name:port, which may stand for several.

    Raises:
        Unreachable: a name is not known.

    """
    found: list[Endpoint] = []
    for address in [addresses] if isinstance(addresses, str) else addresses:
        if not address.startswith(_DNS):
            found.append(Endpoint(address))
            continue
        name, _, port = address.removeprefix(_DNS).rpartition(":")
        try:
            hosts = {str(entry[4][0]) for entry in socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)}
        except (OSError, ValueError) as error:
            raise Unreachable(f"{address} cannot be resolved: {error}; it is dns:///name:port", "address") from error
        # In one order for everybody: the order of an answer changes from one to the next.
        found += [Endpoint(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", name) for host in sorted(hosts)]
    return list(dict.fromkeys(found))


def is_resolved(addresses: str | Sequence[str]) -> bool:
    """Whether any of the addresses is a name whose servers may change."""
    return any(address.startswith(_DNS) for address in ([addresses] if isinstance(addresses, str) else addresses))


def open_channel(address: str, tls: ClientTls | None = None, *, certified_name: str = "") -> grpc.Channel:
    """A channel to host:port, encrypted if `tls` is given.

    Args:
        address: host:port.
        tls: how to know the server.
        certified_name: the name that its certificate must be for; empty means the address's host.

    Raises:
        ConfigurationError: that is no address, or a file of `tls` cannot be read.

    """
    check_address(address, "address")
    if tls is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    options = [*CHANNEL_OPTIONS, *([("grpc.ssl_target_name_override", certified_name)] if certified_name else [])]
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_pem(tls.ca, "tls.ca"),
        private_key=None if tls.key is None else _pem(tls.key, "tls.key"),
        certificate_chain=None if tls.certificate is None else _pem(tls.certificate, "tls.certificate"),
    )
    return grpc.secure_channel(address, credentials, options=options)


def token_metadata(token_file: Path | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries the bearer token in a file; none without a file.

    Raises:
        ConfigurationError: the file cannot be read.

    """
    if token_file is None:
        return ()
    return ((TOKEN_METADATA_KEY, f"{BEARER}{_pem(token_file, 'token_file').decode().strip()}"),)


def check_access(access: ClientAccess, field: str) -> None:
    """Looks whether the files of TLS and of the token are there and can be read.

    Raises:
        ConfigurationError: one cannot, named below `field`.

    """
    tls = access.tls
    files = {"tls.ca": tls.ca, "tls.certificate": tls.certificate, "tls.key": tls.key} if tls else {}
    for name, path in {**files, "token_file": access.token_file}.items():
        if path is not None:
            _pem(path, f"{field}.{name}")


def ask(
    stub: Callable[[grpc.Channel], Any],
    method: str,
    request: Any,
    address: str,
    *,
    server: str,
    timeout_seconds: float,
    access: ClientAccess | None = None,
    metadata: tuple[tuple[str, str], ...] = (),
    wait: bool = False,
    certified_name: str = "",
) -> Any:
    """The answer of a server to one question, over a connection of its own.

    Args:
        stub: the generated class of the service's client.
        method: of the service; one request, one answer.
        request: its message.
        address: host:port.
        server: what the server is, for people: "teacher", "evaluator".
        timeout_seconds: how long to wait for the answer.
        access: TLS and token; none means neither.
        metadata: besides the token's.
        wait: whether a server that is not there yet is waited for; never over TLS, where a handshake that has failed
            would be waited for, too.
        certified_name: as `open_channel`.

    Raises:
        TutelageError: no answer, or a refusal; as `error_of_rpc`.
        ConfigurationError: a file of `access` cannot be read.

    """
    access = access or ClientAccess()
    with open_channel(address, access.tls, certified_name=certified_name) as channel:
        try:
            return getattr(stub(channel), method)(
                request,
                timeout=timeout_seconds,
                wait_for_ready=wait and access.tls is None,
                metadata=(*token_metadata(access.token_file), *metadata),
            )
        except grpc.RpcError as error:
            raise error_of_rpc(error, address, server) from error


def _pem(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error}", field) from error


def _server_credentials(tls: ServerTls) -> Any:
    """Credentials whose files are looked at again for each new connection, so that a renewed one needs no restart."""
    read_as = _state_of(tls)
    configuration = _certificates(tls)

    def fetch() -> Any:
        """The certificates if they have changed; None keeps the ones there are."""
        nonlocal read_as
        try:
            state = _state_of(tls)
            changed = None if state == read_as else _certificates(tls)
        except ConfigurationError as error:  # half-renewed, perhaps: the next connection looks again
            logger.error("the certificates stay as they were: %s", error)
            return None
        if changed is not None:
            logger.info("read %s again", tls.certificate)
            read_as = state
        return changed

    required = tls.client_ca is not None
    return grpc.dynamic_ssl_server_credentials(configuration, fetch, require_client_authentication=required)


def _certificates(tls: ServerTls) -> Any:
    client_ca = None if tls.client_ca is None else _pem(tls.client_ca, "tls.client_ca")
    pair = (_pem(tls.key, "tls.key"), _pem(tls.certificate, "tls.certificate"))
    return grpc.ssl_server_certificate_configuration([pair], client_ca)


def _state_of(tls: ServerTls) -> list[tuple[int, int, int]]:
    paths = [path for path in (tls.certificate, tls.key, tls.client_ca) if path is not None]
    try:
        states = [path.stat() for path in paths]
    except OSError as error:
        raise ConfigurationError(f"cannot read {error.filename}: {error}", "tls") from error
    return [(state.st_mtime_ns, state.st_size, state.st_ino) for state in states]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_server(
    host: str, *, insecure: bool, tls: ServerTls | None, token_file: Path | None, address_file: Path | None
) -> None:
    """Looks whether a server may listen, and whether its files can be read and written; before it starts anything.

    Raises:
        ConfigurationError: as `bind`; or the file of tokens cannot be read, or its address cannot be written.

    """
    _refuse_open(host, insecure=insecure, tls=tls)
    if tls is not None:
        _certificates(tls)
    if token_file is not None:
        _pem(token_file, "token_file")
    if address_file is not None:
        require_writable(address_file.parent, "address_file")


def _refuse_open(host: str, *, insecure: bool, tls: ServerTls | None) -> None:
    if tls is None and not insecure and not is_loopback(host):
        raise ConfigurationError(
            f"{host} can be reached from other machines without encryption or authentication; give it a certificate "
            "(tls), listen on 127.0.0.1 and tunnel, or pass --insecure on a network that you trust",
            "host",
        )


def bind(server: grpc.aio.Server, host: str, port: int, *, insecure: bool, tls: ServerTls | None = None) -> int:
    """Lets a server listen and returns the port (the one chosen, for port 0).

    Raises:
        ConfigurationError: the host is not loopback, there is no `tls` and `insecure` was not said; or a file cannot
            be read; or the port is taken.

    """
    _refuse_open(host, insecure=insecure, tls=tls)
    address = address_of(host, port)
    try:
        if tls is not None:
            return int(server.add_secure_port(address, _server_credentials(tls)))
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise ConfigurationError(f"cannot listen on {address}: {error}", "port") from error


async def serve_health(servicer: Any, host: str, port: int) -> grpc.aio.Server:
    """Answers health checks, and nothing else, on a port of their own without TLS; the status is all that can be read.

    Kubernetes' probes show no certificate and trust any, or none: they cannot ask a port that has mutual TLS.

    Raises:
        ConfigurationError: the port is taken.

    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    bind(server, host, port, insecure=True)
    await server.start()
    return server


# In the text of UNAVAILABLE, which is all that gRPC says; waiting for such a peer does not help.
_SIGNS_OF_TLS = ("handshake failed", "Hostname Verification Check failed")


def error_of_rpc(error: grpc.RpcError, address: str, what: str) -> TutelageError:
    """The exception that a failed call stands for; `what` names the peer for people, e.g. "teacher"."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and any(sign in details for sign in _SIGNS_OF_TLS):
        return NotAuthenticated(f"the {what} at {address} and this client do not agree on TLS ({details})", "tls")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return Unreachable(f"no {what} answers at {address} ({details}); is it started, and is this its address?")
    return error_of_status(code.name, details)


def error_of_refusal(refusal: pb.Refusal) -> TutelageError:
    """The exception that a `Refusal` stands for."""
    status = _STATUS_BY_NUMBER.get(refusal.code, "UNKNOWN")
    if status == Overloaded.status:
        return Overloaded(refusal.message, refusal.field, refusal.retry_after_milliseconds)
    return error_of_status(status, refusal.message, refusal.field)


def refusal_of_error(error: TutelageError) -> pb.Refusal:
    """The `Refusal` that tells a peer of an exception."""
    retry = error.retry_after_milliseconds if isinstance(error, Overloaded) else 0
    return pb.Refusal(
        code=status_code(error).value[0], field=error.field, message=error.message, retry_after_milliseconds=retry
    )


def status_code(error: TutelageError) -> grpc.StatusCode:
    """The gRPC status of an exception."""
    return grpc.StatusCode[error.status]
