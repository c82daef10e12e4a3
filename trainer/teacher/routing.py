"""The servers of one teacher: which of them take part, and which is asked for a sequence.

A request goes where the fewest tokens are outstanding. Whoever asks sends a prompt to the same server of those that
take part (rendezvous hashing, without a word between students), so that its completions find their prefix, and what
was scored once finds its store; unless that server is so far behind that another has computed the prefix sooner.

A server that does not answer, or is another teacher (`same_teacher`), does not take part; it is asked again in the
background, and takes part as soon as it answers as the teacher does.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tutelage.errors import Overloaded, TutelageError, Unreachable
from tutelage.rpc.codec import sequence_digest
from tutelage.rpc.transport import Endpoint, endpoints, is_resolved
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.connection import Connection
from tutelage.trainer.teacher.same_teacher import SameTeacher

# vLLM alone starts in tens of seconds, so who asks every five is back soon after a restart.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 5.0
_RESOLVE_SECONDS = 10.0
# How long a client waits at its start for the other servers, so that its first batch is shared already.
_GATHER_SECONDS = 2.0
# A prefix that has to be computed a second time costs its tokens there, and takes them from other students too.
_PREFIX_WEIGHT = 2
_TRANSIENT = (Unreachable, Overloaded)
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Server:
    """One server, and what is known of it."""

    connection: Connection
    info: pb.GetTeacherInfoResponse | None = None
    """What it announced when it was last found to be the teacher; None while it does not take part."""
    problem: TutelageError | None = None
    """Why it does not, or why it is full."""
    refused: pb.GetTeacherInfoResponse | None = None
    """What it announced when it was last found to be another teacher."""
    failures: int = 0
    """Since its last answer."""
    full_until: float = 0.0
    """Monotonic seconds."""
    outstanding_tokens: int = 0
    outstanding: Counter[int] = field(default_factory=Counter)
    """Requests by the digest of their prompt."""

    @property
    def address(self) -> str:
        """host:port."""
        return self.connection.address

    def has_room(self) -> bool:
        """Whether it takes part, is not full, and reads more requests of a stream."""
        if self.info is None or time.monotonic() < self.full_until:
            return False
        limit = self.info.limits.max_requests_in_flight
        return not limit or self.outstanding.total() < limit

    def pause_seconds(self) -> float:
        """Until it is asked again; with full jitter, so that many students do not return at one moment."""
        longest = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** min(self.failures, 10))
        return random.uniform(0, longest)  # noqa: S311 (no secret)


@dataclass(frozen=True)
class Asked:
    """A request that a server owes the answer to."""

    server: Server
    instance_id: str
    """Of the process that was found to be the teacher."""
    tokens: int
    """That it has to compute for it."""
    prompt: int
    """Digest of the prompt."""


class Servers:
    """The servers of one teacher.

    Args:
        addresses: host:port, several of them, or dns:///name:port.
        connect: makes a connection.
        same: says whether a server is the teacher.

    """

    def __init__(
        self, addresses: str | Sequence[str], connect: Callable[[Endpoint], Connection], same: SameTeacher
    ) -> None:
        self._addresses, self._connect, self._same = addresses, connect, same
        self._servers: dict[str, Server] = {}
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._closed = threading.Event()

    def open(self, waiting: Callable[[str], None]) -> pb.GetTeacherInfoResponse:
        """Finds the first server that is the teacher, and has the others take part when they are.

        Args:
            waiting: told why nobody takes part yet; raises to give up.

        Raises:
            TutelageError: what each server that answers was refused for, if none is left to wait for.

        """
        while True:
            try:
                self._resolve()
            except Unreachable as error:
                reason: TutelageError = error
            else:
                if any(self._joins(server) for server in self._servers.values()):
                    break
                reason = self.require_hope()
            waiting(reason.message)
        others = [server for server in self._servers.values() if server.info is None]
        for server in others:
            self._look_after(server, at_once=server.problem is None)
        with self._changed:
            self._changed.wait_for(lambda: all(_is_known(server) for server in others), _GATHER_SECONDS)
        if is_resolved(self._addresses):
            threading.Thread(target=self._follow_names, name="teacher-names", daemon=True).start()
        assert self._same.info is not None
        return self._same.info

    def close(self) -> None:
        """Ends all connections."""
        self._closed.set()
        for server in self._servers.values():
            server.connection.close()

    def listen(self, listener: Callable[[], None]) -> None:
        """Has a function called, in any thread, whenever a server takes part again or turns out not to."""
        self._listeners.append(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        """Ends `listen`."""
        self._listeners.remove(listener)

    @property
    def taking_part(self) -> list[Server]:
        """Those that are the teacher and there."""
        return [server for server in list(self._servers.values()) if server.info is not None]

    def ask(self, sequence: TokenSequence, but_not: Collection[Server] = ()) -> Asked | None:
        """Who is to score a sequence, which counts as outstanding there until `done`; None while nobody has room."""
        with self._changed:
            free = [server for server in self.taking_part if server.has_room() and server not in but_not]
            if not free:
                return None
            prompt_tokens = sequence.prompt_tokens
            prompt = sequence_digest(sequence.ids[:prompt_tokens] if prompt_tokens else sequence.ids)
            # What a server that has the sequence's beginning need not compute: of one that grew, all that came before.
            known = max(prompt_tokens, sequence.start)
            home = max(self.taking_part, key=lambda server: _rendezvous(server.address, prompt))

            def later(server: Server) -> tuple[int, bool]:
                has_prefix = server is home or prompt in server.outstanding
                return server.outstanding_tokens + (0 if has_prefix else _PREFIX_WEIGHT * known), not has_prefix

            server = min(free, key=later)
            grew = 0 < prompt_tokens <= sequence.start
            tokens = len(sequence.ids) - (known if grew or prompt in server.outstanding else 0)
            server.outstanding_tokens += tokens
            server.outstanding[prompt] += 1
            assert server.info is not None
            return Asked(server, server.info.instance_id, tokens, prompt)

    def done(self, asked: Asked, *, answered: bool) -> None:
        """A request is no longer outstanding."""
        with self._changed:
            asked.server.outstanding_tokens -= asked.tokens
            asked.server.outstanding -= Counter([asked.prompt])
            if answered:
                asked.server.failures, asked.server.problem = 0, None

    def is_full(self, server: Server, error: Overloaded) -> None:
        """A server has no room now; it is asked again after what it says and the jitter."""
        now = time.monotonic()
        if now < server.full_until:  # It refuses all that it has no room for, one by one.
            return
        server.problem = error
        server.failures += 1
        server.full_until = now + error.retry_after_milliseconds / 1000 + server.pause_seconds()

    def lose(self, server: Server, error: TutelageError) -> None:
        """A server broke a stream: it takes no part until it is back."""
        with self._changed:
            if server.info is None:
                return
            before, server.info = server.info, None
        self._note(server, before, error)
        self._look_after(server)

    def require_hope(self) -> TutelageError:
        """Why there is no room now, where there may be some later.

        Raises:
            TutelageError: all were found to be something else, so there is nothing to wait for.

        """
        problems = []
        for server in self._servers.values():
            if server.problem is None:
                return Unreachable("the teacher has no room")
            if server.info is not None or isinstance(server.problem, _TRANSIENT):
                return server.problem
            problems.append(server.problem)
        raise problems[0]

    def why_silent(self) -> str:
        """Why nothing came of those that take part: what one said when it refused, if that was the last of it."""
        said = [server.problem.message for server in self.taking_part if server.problem is not None]
        return said[0] if said else f"no answer came from {', '.join(server.address for server in self.taking_part)}"

    def seconds_until_room(self) -> float:
        """Until a full server is asked again; 0 if there is none."""
        waits = [server.full_until - time.monotonic() for server in self.taking_part]
        return max(0.0, min((wait for wait in waits if wait > 0), default=0.0))

    def _joins(self, server: Server) -> bool:
        """Whether a server takes part, after it was asked."""
        info = None
        try:
            info = server.connection.info()
            # Of the same process, whose answer was refused already: not measured again.
            if info == server.refused:
                return False
            self._same.require(info, server.connection)
        except TutelageError as error:
            self._note(server, info, error)
            return False
        with self._changed:
            if server.problem is not None:
                _log.info("the teacher at %s takes part again", server.address)
            server.info, server.problem, server.refused, server.failures = info, None, None, 0
            self._changed.notify_all()
        for listener in list(self._listeners):
            listener()
        return True

    def _note(self, server: Server, info: pb.GetTeacherInfoResponse | None, error: TutelageError) -> None:
        transient = isinstance(error, _TRANSIENT)
        with self._changed:
            if server.problem is None or isinstance(server.problem, _TRANSIENT) != transient:
                _log.warning("the teacher at %s is %s: %s", server.address, "away" if transient else "not used", error)
            server.problem = error
            server.refused = server.refused if transient else info
            server.failures += 1
            self._changed.notify_all()
        for listener in list(self._listeners):
            listener()

    def _look_after(self, server: Server, *, at_once: bool = False) -> None:
        def ask() -> None:
            # gRPC's for a channel that was closed meanwhile.
            with suppress(ValueError):
                if at_once and self._joins(server):
                    return
                while not self._closed.wait(server.pause_seconds()) and server.address in self._servers:
                    if self._joins(server):
                        return

        threading.Thread(target=ask, name=f"teacher-{server.address}", daemon=True).start()

    def _resolve(self) -> list[Server]:
        """Takes in servers that are new under a name, which are returned, and forgets those that have left it."""
        found = {endpoint.address: endpoint for endpoint in endpoints(self._addresses)}
        new = {address: Server(self._connect(found[address])) for address in found.keys() - self._servers.keys()}
        stays = {address: each for address, each in self._servers.items() if address in found or each.info is not None}
        for address in self._servers.keys() - stays.keys():
            self._servers[address].connection.close()
        both = stays | new
        # In the order in which they are named: the first that answers is the one that the others are compared with.
        self._servers = {address: both[address] for address in [*found, *stays] if address in both}
        return list(new.values())

    def _follow_names(self) -> None:
        while not self._closed.wait(_RESOLVE_SECONDS):
            try:
                new = self._resolve()
            except Unreachable as error:
                _log.warning("%s", error)  # those that are known stay
                continue
            for server in new:
                self._look_after(server, at_once=True)


def _is_known(server: Server) -> bool:
    return server.info is not None or server.problem is not None


def _rendezvous(address: str, prompt: int) -> bytes:
    """The server with the largest value is a prompt's own: of those that take part, whoever asks and whenever."""
    return hashlib.sha256(f"{address} {prompt}".encode()).digest()
