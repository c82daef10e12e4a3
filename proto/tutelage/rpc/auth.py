"""Bearer tokens with scopes, from a file that is read again when it changes; what no scope covers is refused."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2

from tutelage.errors import ConfigurationError, NotAuthenticated, NotPermitted, TutelageError
from tutelage.names import check_name
from tutelage.rpc.transport import BEARER, STUDENT_METADATA_KEY, TOKEN_METADATA_KEY, status_code

logger = logging.getLogger(__name__)

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


@dataclass(frozen=True)
class Grant:
    """What one token allows."""

    digest: bytes
    """SHA-256 of the token."""
    scopes: frozenset[str]
    student_id: str | None
    """The only student that may use it; None if any may."""


class TokenFile:
    """The grants in a file.

    Args:
        path: the file.
        scopes: those that there are.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not TOKEN SCOPE[,SCOPE…] [STUDENT].

    """

    def __init__(self, path: Path, scopes: Sequence[str]) -> None:
        self._path, self._scopes = path, scopes
        self._read_as = self._state()
        self._grants = _parse(path, scopes)

    def grant(self, token: str) -> Grant:
        """What a token allows; the time this takes does not depend on the token.

        Raises:
            NotAuthenticated: nobody has this token.

        """
        self._read_if_changed()
        digest = hashlib.sha256(token.encode()).digest()
        matches = [grant for grant in self._grants if hmac.compare_digest(grant.digest, digest)]
        if not matches:
            raise NotAuthenticated("the bearer token is not one that this server knows", TOKEN_METADATA_KEY)
        return matches[0]

    def _read_if_changed(self) -> None:
        try:
            state = self._state()
            if state != self._read_as:
                self._read_as = state
                self._grants = _parse(self._path, self._scopes)
                logger.info("read %s again: %d tokens", self._path, len(self._grants))
        except (OSError, ConfigurationError) as error:  # half-written, perhaps: the next call reads it again
            logger.error("the tokens stay as they were: %s", error)

    def _state(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise ConfigurationError(f"cannot read {self._path}: {error}", "token_file") from error
        return status.st_mtime_ns, status.st_size, status.st_ino


def _parse(path: Path, scopes: Sequence[str]) -> list[Grant]:
    lines = path.read_text(encoding="utf-8").splitlines()
    words = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"]
    return [_grant(f"line {number} of {path}", parts, scopes) for number, parts in words]


def _grant(where: str, parts: list[str], scopes: Sequence[str]) -> Grant:
    # The message never shows the line, which holds a secret.
    if len(parts) not in (2, 3) or not set(parts[1].split(",")) <= set(scopes):
        raise ConfigurationError(f"{where} is not TOKEN {','.join(scopes)} [STUDENT]", "token_file")
    student_id = check_name(parts[2], "token_file") if len(parts) == 3 else None
    return Grant(hashlib.sha256(parts[0].encode()).digest(), frozenset(parts[1].split(",")), student_id)


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets a call through if its token has the scope of its method.

    Args:
        token_file: the tokens.
        scope_of_method: by full name; a method that is not there needs a scope that nobody has, but for health,
            which needs none.

    Raises:
        ConfigurationError: as `TokenFile`.

    """

    def __init__(self, token_file: Path, scope_of_method: Mapping[str, str]) -> None:
        self._scope_of_method = scope_of_method
        self._tokens = TokenFile(token_file, sorted(set(scope_of_method.values())))

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """As grpc defines it."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(f"/{_HEALTH}/"):
            return handler
        try:
            self._check(method, dict(handler_call_details.invocation_metadata))
        except TutelageError as error:
            return _refusing(handler, error)
        return handler

    def _check(self, method: str, metadata: dict[str, str]) -> None:
        given = metadata.get(TOKEN_METADATA_KEY, "")
        if not given.startswith(BEARER):
            raise NotAuthenticated("this server asks for a bearer token; name its file (token_file)", "authorization")
        grant, scope = self._tokens.grant(given.removeprefix(BEARER)), self._scope_of_method.get(method, method)
        if scope not in grant.scopes:
            raise NotPermitted(f"this token has not the scope {scope!r}", TOKEN_METADATA_KEY)
        if grant.student_id not in (None, metadata.get(STUDENT_METADATA_KEY)):
            raise NotPermitted("this token belongs to another student", STUDENT_METADATA_KEY)


def _refusing(handler: Any, error: TutelageError) -> Any:
    """A handler of the same kind that refuses."""

    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(status_code(error), str(error))

    kind = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return kind(refuse, handler.request_deserializer, handler.response_serializer)
