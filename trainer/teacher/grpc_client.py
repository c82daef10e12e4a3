"""The trainer's side of the teacher's contract: connects, asks, checks, waits for a teacher that is away.

A teacher is one server, or several with the same weights (`routing`). One that is killed and comes back costs waiting
time and nothing else: scoring the same tokens again gives the same signals, so what a server owes when its stream
breaks is asked of another, or of itself when it is back. Another teacher under its address is not used, and ends the
run where it is the only one.

Make the client in the process that uses it: gRPC does not survive a fork.
"""

from __future__ import annotations

import hashlib
import random
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from tutelage.errors import CorruptFrame, Overloaded, Unreachable
from tutelage.rpc import codec
from tutelage.rpc.tls import ClientTls
from tutelage.rpc.transport import Endpoint, error_of_refusal, is_resolved
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, TeacherIdentity, UnembeddingArrays
from tutelage.trainer.teacher.connection import Connection, Outcome, ScoreStream
from tutelage.trainer.teacher.frame_decoder import Answer, to_message
from tutelage.trainer.teacher.routing import Asked, Server, Servers
from tutelage.trainer.teacher.same_teacher import SameTeacher

_REPORT_SECONDS = 1.0

Waiting = Callable[[float, str], None]
"""Called about once a second with the seconds waited so far and why; may raise to stop waiting."""


class TeacherClient:
    """A `Teacher` behind gRPC.

    Args:
        address: host:port, a list of these, or dns:///name:port, which may stand for several.
        student_id: under which the servers count the work.
        wait_seconds: longest wait for a teacher that does not answer, and for one answer.
        tokenizer_digests: of the student; must equal the teacher's.
        chat_template_digest: of the student's template, if the teacher must have it too; empty if it need not.
        weights_digest: of the teacher that this run began with; empty if it begins now.
        adapter: name of the teacher's LoRA adapter; none means the base model.
        waiting: told about waiting.
        tls: how to know the teacher; none means an unencrypted connection.
        token_file: file with our bearer token, read again before each call.

    Raises:
        Unreachable: no teacher answered in time.
        IdentityMismatch: another tokenizer, or another teacher than the one the run began with.
        NotServed: the teacher does not score.

    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        student_id: str,
        wait_seconds: float,
        tokenizer_digests: Mapping[str, str],
        chat_template_digest: str = "",
        weights_digest: str = "",
        adapter: str | None = None,
        waiting: Waiting = lambda _seconds, _reason: None,
        tls: ClientTls | None = None,
        token_file: Path | None = None,
    ) -> None:
        self._wait_seconds, self._waiting = wait_seconds, waiting
        self._unembedding: UnembeddingArrays | None = None
        self.waited_seconds = 0.0

        def connect(endpoint: Endpoint) -> Connection:
            return Connection(endpoint, student_id=student_id, adapter=adapter, tls=tls, token_file=token_file)

        same = SameTeacher(
            tokenizer_digests=tokenizer_digests,
            chat_template_digest=chat_template_digest,
            weights_digest=weights_digest,
            canary=not isinstance(address, str) or is_resolved(address),
        )
        self._servers, patience = Servers(address, connect, same), _Patience(wait_seconds)
        try:
            self._info = self._servers.open(lambda reason: self._wait(patience, reason, _sleep))
        except BaseException:
            self.close()
            raise
        self.identity = TeacherIdentity(
            self._info.model_name,
            self._info.weights_digest,
            self._info.vocabulary_size,
            self._info.hidden_size,
            self._info.noise_floor.mean_kl,
            tuple(self._info.end_token_ids),
            self._info.prefix_cache.block_tokens,
        )

    def close(self) -> None:
        """Ends the connections."""
        self._servers.close()

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def servers(self) -> tuple[str, ...]:
        """Addresses of those that take part now."""
        return tuple(server.address for server in self._servers.taking_part)

    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        """As `Teacher.score`; all sequences are in flight, on one stream to each server.

        Raises:
            CorruptFrame: the teacher answered what it must not; nothing of it is used.
            Unreachable: for longer than `wait_seconds` the teacher completed no answer.
            IdentityMismatch: another teacher answered.
            TutelageError: the teacher refused a request; the message says why.

        """
        size, patience = (self._info.vocabulary_size, self._info.hidden_size), _Patience(self._wait_seconds)
        answers = {str(index): Answer(sequence, spec, *size) for index, sequence in enumerate(sequences)}
        with _Scoring(self._servers, answers) as scoring:
            while scoring.missing:
                missing = scoring.missing
                scoring.ask()
                if scoring.is_owed:
                    scoring.take(min(patience.left, self._servers.seconds_until_room() or patience.left))
                    patience.require(self._servers.why_silent())
                else:
                    self._wait(patience, self._servers.require_hope().message, scoring.take)
                if scoring.missing < missing:
                    patience = _Patience(self._wait_seconds)
        return [answer.arrays() for answer in answers.values()]

    def unembedding(self) -> UnembeddingArrays:
        """The matrix that turns `hidden` into logits; fetched once.

        Raises:
            CorruptFrame: what arrived is not what the teacher announced.
            Unreachable: as `score`.

        """
        download, patience = _UnembeddingDownload(self._info.unembedding), _Patience(self._wait_seconds)
        while self._unembedding is None:
            server = next(iter(self._servers.taking_part), None)
            if server is None:
                self._wait(patience, self._servers.require_hope().message, _sleep)
                continue
            try:
                for chunk in server.connection.unembedding(download.rows, self._wait_seconds):
                    download.add(chunk)
                    patience = _Patience(self._wait_seconds)
                self._unembedding = download.arrays()
            except (Unreachable, Overloaded) as error:
                self._servers.lose(server, error)
        return self._unembedding

    def _wait(self, patience: _Patience, reason: str, wait: Callable[[float], None]) -> None:
        """Waits for a teacher that is away or full, not for long, and says why.

        Raises:
            Unreachable: it has been too long.

        """
        self._waiting(patience.waited_seconds, reason)
        began = time.monotonic()
        wait(min(_REPORT_SECONDS, patience.left, self._servers.seconds_until_room() or _REPORT_SECONDS))
        self.waited_seconds += time.monotonic() - began
        patience.require(reason)


def _sleep(seconds: float) -> None:
    # With jitter, so that many students do not return at one moment.
    time.sleep(random.uniform(0, seconds))  # noqa: S311 (no secret)


class _Patience:
    """How long a teacher may complete nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._since = seconds, time.monotonic()

    @property
    def waited_seconds(self) -> float:
        """So far."""
        return time.monotonic() - self._since

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._seconds - self.waited_seconds)

    def require(self, reason: str) -> None:
        """Gives up when nothing is left.

        Raises:
            Unreachable: with the reason.

        """
        if not self.left:
            raise Unreachable(f"waited {self.waited_seconds:.0f} s: {reason}", "teacher.address")


class _Scoring:
    """One call of `score`: what is missing, and which server owes it; a context manager.

    Args:
        servers: of the teacher.
        answers: to be completed, by request id.

    """

    def __init__(self, servers: Servers, answers: dict[str, Answer]) -> None:
        self._servers, self._answers = servers, answers
        # The longest first: what comes last then evens out what the servers have to do.
        self._unasked = sorted(answers, key=lambda key: -len(answers[key].sequence.ids))
        self._asked: dict[str, tuple[Asked, ScoreStream]] = {}
        self._refused: defaultdict[str, set[Server]] = defaultdict(set)
        self._streams: dict[ScoreStream, Server] = {}
        self._events: SimpleQueue[tuple[ScoreStream, Outcome] | None] = SimpleQueue()

    def __enter__(self) -> _Scoring:
        self._servers.listen(self._wake)
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.forget(self._wake)
        for stream in self._streams:
            stream.close()
        for asked, _stream in self._asked.values():
            self._servers.done(asked, answered=False)

    @property
    def missing(self) -> int:
        """Answers that are not complete."""
        return len(self._unasked) + len(self._asked)

    @property
    def is_owed(self) -> bool:
        """Whether a server has been asked for something that it has not answered yet."""
        return bool(self._asked)

    def ask(self) -> None:
        """Asks for all that is not asked, as far as servers have room."""
        waiting, self._unasked = self._unasked, []
        for index, key in enumerate(waiting):
            answer, refused = self._answers[key], self._refused[key]
            asked = self._servers.ask(answer.sequence, refused)
            if asked is None:
                self._unasked.append(key)
                if refused:
                    continue
                self._unasked += waiting[index + 1 :]  # Nobody has room.
                break
            stream = self._stream_to(asked)
            self._asked[key] = asked, stream
            stream.send(to_message(key, answer.sequence, answer.spec))
        if not self._unasked:
            for stream in self._streams:
                stream.finish()

    def take(self, seconds: float) -> None:
        """Takes what a server says next, or that one takes part again, if anything happens within the time.

        Raises:
            CorruptFrame: the teacher said what it must not.
            TutelageError: every server refuses a request.

        """
        try:
            event = self._events.get(timeout=seconds)
        except Empty:
            return
        if event is None or event[0] not in self._streams:  # The last words of a stream that was given up.
            return
        stream, outcome = event
        if isinstance(outcome, pb.ScoreSequencesResponse):
            self._take_response(stream, outcome)
            return
        server = self._streams.pop(stream)
        stream.close()
        owed = [key for key, (_, each) in self._asked.items() if each is stream]
        if outcome is None and owed:
            raise CorruptFrame(f"the stream ended with {len(owed)} requests unanswered", "last")
        for key in owed:
            self._ask_again(key)
        if outcome is not None:
            self._servers.lose(server, outcome)

    def _stream_to(self, asked: Asked) -> ScoreStream:
        """A stream to a server that takes more requests."""
        for stream, server in self._streams.items():
            if server is asked.server and not stream.finished:
                return stream
        connection = asked.server.connection
        stream = connection.stream(asked.instance_id, lambda stream, outcome: self._events.put((stream, outcome)))
        self._streams[stream] = asked.server
        return stream

    def _take_response(self, stream: ScoreStream, response: pb.ScoreSequencesResponse) -> None:
        key = response.request_id
        asked, asked_of = self._asked.get(key, (None, None))
        if asked is None or asked_of is not stream:
            raise CorruptFrame(f"an answer to {key!r}, which was not asked", "request_id")
        if response.WhichOneof("outcome") == "frame":
            self._answers[key].add(response.frame)
            if self._answers[key].complete:
                del self._asked[key]
                self._servers.done(asked, answered=True)
            return
        error = error_of_refusal(response.refusal)
        self._ask_again(key)
        if isinstance(error, Overloaded):
            self._servers.is_full(asked.server, error)
            return
        self._refused[key].add(asked.server)
        if not set(self._servers.taking_part) - self._refused[key]:
            raise error

    def _ask_again(self, key: str) -> None:
        asked, _ = self._asked.pop(key)
        self._servers.done(asked, answered=False)
        # A broken stream may have ended within a sequence; half of an answer is never continued.
        before = self._answers[key]
        self._answers[key] = Answer(before.sequence, before.spec, before.vocabulary_size, before.hidden_size)
        self._unasked.append(key)

    def _wake(self) -> None:
        self._events.put(None)


class _UnembeddingDownload:
    """Rows that arrived so far; a broken download goes on where it was."""

    def __init__(self, announced: pb.Unembedding) -> None:
        self._announced = announced
        self._row_parts: list[npt.NDArray[Any]] = []
        self._bias_parts: list[npt.NDArray[np.float32]] = []
        self.rows = 0

    def add(self, chunk: pb.GetUnembeddingResponse) -> None:
        """Checks and keeps one chunk."""
        crc = zlib.crc32(chunk.bias.data, zlib.crc32(chunk.rows.data))
        if chunk.row_start != self.rows or crc != chunk.checksum:
            raise CorruptFrame(f"rows from {chunk.row_start} are out of order or damaged", "unembedding")
        rows = codec.decode(chunk.rows, "rows")
        if rows.ndim != 2 or rows.shape[1] != self._announced.columns or chunk.rows.dtype != self._announced.dtype:
            raise CorruptFrame(f"rows of shape {rows.shape} and dtype {rows.dtype} were not announced", "unembedding")
        self._row_parts.append(rows)
        if self._announced.has_bias:
            self._bias_parts.append(codec.decode(chunk.bias, "bias"))
        self.rows += len(rows)

    def arrays(self) -> UnembeddingArrays:
        """All of it, after its digest was compared."""
        rows_VD = np.concatenate(self._row_parts)
        bias_V = np.concatenate(self._bias_parts) if self._bias_parts else None
        digest = hashlib.sha256(rows_VD.data)
        if bias_V is not None:
            digest.update(bias_V.data)
        if self.rows != self._announced.rows or digest.hexdigest() != self._announced.digest:
            raise CorruptFrame(f"{self.rows} rows are not the {self._announced.rows} announced", "unembedding")
        return UnembeddingArrays(rows_VD, bias_V, self._announced.logit_scale, self._announced.logit_softcap)
