"""Both sides of every gRPC connection: message limits, keepalive, where to listen, errors as statuses.

A server binds to loopback unless it is told `insecure`: nothing here encrypts or authenticates.
"""

from __future__ import annotations

import ipaddress

import grpc
import grpc.aio

from tutelage.errors import ConfigurationError, Overloaded, TutelageError, Unreachable, error_of_status
from tutelage.teacher.v1 import teacher_pb2 as pb

STUDENT_METADATA_KEY = "tutelage-student"
MAX_MESSAGE_BYTES = 16 * 2**20

# A dead peer is noticed after keepalive_time + ping_timeout. Core ignores misspelt keys silently.
_COMMON_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
]
CHANNEL_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
]
SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


_STATUS_BY_NUMBER = {code.value[0]: code.name for code in grpc.StatusCode}


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bind(server: grpc.aio.Server, address: str, *, insecure: bool) -> int:
    """Adds `host:port` to a server and returns the port (the one chosen, for port 0).

    Raises:
        ConfigurationError: the address is not `host:port`; or the host is not loopback and
            `insecure` was not said; or the port is taken.

    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigurationError(f"{address!r} is not host:port, for example 127.0.0.1:50051", "address")
    if not _is_loopback(host) and not insecure:
        raise ConfigurationError(
            f"{address} can be reached from other machines without encryption or authentication; listen on "
            "127.0.0.1 and tunnel, or pass --insecure on a network that you trust",
            "address",
        )
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise ConfigurationError(f"cannot listen on {address}: {error}", "address") from error


def error_of_rpc(error: grpc.RpcError, address: str, what: str) -> TutelageError:
    """The exception that a failed call stands for; `what` names the peer for people, e.g. "teacher"."""
    code, details = error.code(), error.details() or ""
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
