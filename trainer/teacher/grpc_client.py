"""The trainer's side of the teacher's contract: connects, asks, checks, waits for a teacher that is away.

A teacher that is killed and comes back costs waiting time and nothing else: scoring the same tokens
again gives the same signals, so what is unanswered when a stream breaks is asked again. Another teacher
under the same address ends the run.

Make the client in the process that uses it: gRPC does not survive a fork.
"""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception_type, wait_random_exponential

from tutelage.errors import CorruptFrame, IdentityMismatch, NotServed, Overloaded, TutelageError, Unreachable
from tutelage.identity import require_same_template, require_same_tokenizer
from tutelage.rpc import codec
from tutelage.rpc.tls import ClientTls
from tutelage.rpc.transport import (
    ADAPTER_METADATA_KEY,
    STUDENT_METADATA_KEY,
    error_of_refusal,
    error_of_rpc,
    open_channel,
    token_metadata,
)
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.rpc.v1 import teacher_pb2_grpc as rpc
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, TeacherIdentity, UnembeddingArrays
from tutelage.trainer.teacher.frame_decoder import Answer, to_message

# vLLM alone starts in tens of seconds, so who asks every five is back soon after a restart.
_FIRST_BACKOFF_SECONDS, _LONGEST_BACKOFF_SECONDS = 0.2, 5.0
_INFO_TIMEOUT_SECONDS = 10.0

ResultT = TypeVar("ResultT")
Waiting = Callable[[float, str], None]
"""Called about once per attempt with the seconds waited so far and why; may raise to stop waiting."""


class TeacherClient:
    """A `Teacher` behind gRPC.

    Args:
        address: host:port.
        student_id: under which the server counts the work.
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
        address: str,
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
        self._address, self._wait_seconds, self._waiting = address, wait_seconds, waiting
        self._student_id, self._adapter, self._token_file = student_id, adapter, token_file
        self._channel = open_channel(address, tls)
        self._stub = rpc.TeacherServiceStub(self._channel)
        self._unembedding: UnembeddingArrays | None = None
        self.waited_seconds = 0.0
        try:
            self._info = self._with_retry(self._get_info)
            require_same_tokenizer(self._info.tokenizer_digests, tokenizer_digests)
            require_same_template(self._info.chat_template_digest, chat_template_digest)
            self._require_same_teacher(weights_digest or self._info.weights_digest, self._info)
            if pb.TEACHER_ROLE_SCORE not in self._info.roles:
                raise NotServed(f"the teacher at {address} does not score; serve it with the role score", "roles")
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
        )

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        """As `Teacher.score`; all sequences are in flight on one stream.

        Raises:
            CorruptFrame: the teacher answered what it must not; nothing of it is used.
            Unreachable: for longer than `wait_seconds` the teacher completed no answer.
            IdentityMismatch: another teacher answered.
            TutelageError: the teacher refused a request; the message says why.

        """
        size = (self._info.vocabulary_size, self._info.hidden_size)
        answers = {str(index): Answer(sequence, spec, *size) for index, sequence in enumerate(sequences)}
        self._with_retry(lambda: self._stream(answers), lambda: sum(each.complete for each in answers.values()))
        return [answer.arrays() for answer in answers.values()]

    def unembedding(self) -> UnembeddingArrays:
        """The matrix that turns `hidden` into logits; fetched once.

        Raises:
            CorruptFrame: what arrived is not what the teacher announced.
            Unreachable: as `score`.

        """
        if self._unembedding is None:
            download = _UnembeddingDownload(self._info.unembedding)
            self._with_retry(lambda: self._fetch_unembedding(download), lambda: download.rows)
            self._unembedding = download.arrays()
        return self._unembedding

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        adapter = () if self._adapter is None else ((ADAPTER_METADATA_KEY, self._adapter),)
        return ((STUDENT_METADATA_KEY, self._student_id), *adapter, *token_metadata(self._token_file))

    def _get_info(self) -> pb.GetTeacherInfoResponse:
        request = pb.GetTeacherInfoRequest()
        return self._stub.GetTeacherInfo(request, timeout=_INFO_TIMEOUT_SECONDS, metadata=self._metadata)

    def _stream(self, answers: dict[str, Answer]) -> None:
        """Asks for what is not complete; returns when it is, and the teacher is known to be the same."""
        for key, answer in answers.items():
            if not answer.complete:
                # A broken stream may have ended within a sequence; half of an answer is never continued.
                answers[key] = Answer(answer.sequence, answer.spec, answer.vocabulary_size, answer.hidden_size)
        open_keys = [key for key, answer in answers.items() if not answer.complete]
        messages = [to_message(key, answers[key].sequence, answers[key].spec) for key in open_keys]
        if messages:
            call = self._stub.ScoreSequences(iter(messages), timeout=self._wait_seconds, metadata=self._metadata)
            try:
                _collect(call, answers)
            finally:
                # Else the server would go on computing for a stream that nobody reads.
                call.cancel()
        # The channel reconnects by itself: who answered is known only afterwards.
        info = self._get_info()
        self._require_same_teacher(self._info.weights_digest, info)

    def _fetch_unembedding(self, download: _UnembeddingDownload) -> None:
        self._require_same_teacher(self._info.weights_digest, self._get_info())
        request = pb.GetUnembeddingRequest(row_start=download.rows)
        for chunk in self._stub.GetUnembedding(request, timeout=self._wait_seconds, metadata=self._metadata):
            download.add(chunk)

    def _require_same_teacher(self, weights_digest: str, info: pb.GetTeacherInfoResponse) -> None:
        if info.weights_digest != weights_digest:
            raise IdentityMismatch(
                f"the teacher at {self._address} has weights {info.weights_digest[:12]}…, but this run began with "
                f"{weights_digest[:12]}…; serve that teacher again, or begin a new run in another output folder",
                "teacher",
            )

    def _with_retry(self, attempt: Callable[[], ResultT], progress: Callable[[], int] = lambda: 0) -> ResultT:
        """What the attempt returns; it is repeated while the teacher is away or full.

        Args:
            attempt: asks the teacher; may be called many times.
            progress: counts what has been received; as long as it grows, the teacher is slow, not away.

        Raises:
            Unreachable: `wait_seconds` have passed since the first failure, or since the first one after progress.
            TutelageError: the teacher refused for another reason.

        """
        outage = _Outage(self._wait_seconds, progress)

        def once() -> ResultT:
            try:
                return attempt()
            except grpc.RpcError as error:
                raise error_of_rpc(error, self._address, "teacher") from error

        def report(_: RetryCallState) -> None:
            self._waiting(outage.seconds, outage.reason)

        def sleep(seconds: float) -> None:
            time.sleep(seconds)
            self.waited_seconds += seconds

        retrying = Retrying(
            retry=retry_if_exception_type((Unreachable, Overloaded)),
            after=outage.note,
            wait=outage.pause,
            stop=outage.is_too_long,
            before_sleep=report,
            sleep=sleep,
        )
        try:
            return retrying(once)
        except RetryError as error:
            problem = f"waited {outage.seconds:.0f} s: {outage.reason}"
            raise Unreachable(problem, "teacher.address") from error.last_attempt.exception()


class _Outage:
    """How long a teacher has given nothing, and how long to pause before the next attempt."""

    def __init__(self, longest_seconds: float, progress: Callable[[], int]) -> None:
        self._longest_seconds, self._progress = longest_seconds, progress
        self._since, self._made = math.inf, progress()
        # Full jitter, so that many students do not return at one moment.
        self._jitter = wait_random_exponential(multiplier=_FIRST_BACKOFF_SECONDS, max=_LONGEST_BACKOFF_SECONDS)
        self.seconds, self.reason = 0.0, ""

    def note(self, state: RetryCallState) -> None:
        """Takes a failed attempt into account."""
        now, made = time.monotonic(), self._progress()
        # tenacity's own delays count from the first attempt, however much has been received since.
        if made > self._made or self._since == math.inf:
            self._since, self._made = now, made
        self.seconds, self.reason = now - self._since, _problem(state).message

    def pause(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: what a full teacher asks for and the jitter, within what is left."""
        problem = _problem(state)
        at_least = problem.retry_after_milliseconds / 1000 if isinstance(problem, Overloaded) else 0.0
        return min(at_least + self._jitter(state), self._longest_seconds - self.seconds)

    def is_too_long(self, _: RetryCallState) -> bool:
        """Whether to give up."""
        return self.seconds >= self._longest_seconds


def _problem(state: RetryCallState) -> TutelageError:
    assert state.outcome is not None
    problem = state.outcome.exception()
    assert isinstance(problem, TutelageError)
    return problem


def _collect(call: Iterable[pb.ScoreSequencesResponse], answers: Mapping[str, Answer]) -> None:
    """Takes all answers; a teacher that is full may refuse some, which are asked for again later."""
    full: TutelageError | None = None
    missing = sum(not answer.complete for answer in answers.values())
    for response in call:
        answer = answers.get(response.request_id)
        if answer is None:
            raise CorruptFrame(f"an answer to {response.request_id!r}, which was not asked", "request_id")
        if response.WhichOneof("outcome") == "refusal":
            full = error_of_refusal(response.refusal)
            if not isinstance(full, Overloaded):
                raise full
            missing -= 1
        else:
            answer.add(response.frame)
            missing -= answer.complete
        if not missing and full is not None:
            raise full
        if not missing:
            return
    raise CorruptFrame(f"the stream ended with {missing} requests unanswered", "last")


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
