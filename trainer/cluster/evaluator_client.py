"""Sends checkpoints to the evaluator without making the training wait.

An evaluator that is away is waited for, five minutes since it last took something. A failure does not stop a training:
it is logged, and every submission and its fate is a line of `evaluations.jsonl` in the student's folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_fixed

from tutelage.errors import TutelageError
from tutelage.rpc.transport import STUDENT_METADATA_KEY, error_of_rpc, open_channel, token_metadata
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as rpc
from tutelage.trainer.config.services import EvaluatorConfig
from tutelage.trainer.config.student import StudentConfig

_TIMEOUT_SECONDS, _PAUSE_SECONDS = 10.0, 2.0
# Long enough for a host that is cut off, or restarted; a training that has ended waits no longer for its last scores.
_PATIENCE_SECONDS = 300.0
# Longer ones the evaluator refuses: they become names of its files.
_LONGEST_ID = 128
_WORTH_ANOTHER_TRY = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_log = logging.getLogger(__name__)


def _is_worth_another_try(error: BaseException) -> bool:
    return getattr(error, "status", "") in _WORTH_ANOTHER_TRY


def evaluation_id_of(run: str, student_id: str, step: int) -> str:
    """The name of the evaluation of a checkpoint: the same for the same, another for another, at most 128 long.

    Names that are together too long for the evaluator are cut, and told apart by a digest of the whole.

    Args:
        run: name of the run, at most 64 long.
        student_id: at most 64 long.
        step: of the checkpoint.

    """
    whole = f"{run}.{student_id}.step-{step}"
    if len(whole) <= _LONGEST_ID:
        return whole
    digest = hashlib.sha256(f"{run}.{student_id}".encode()).hexdigest()[:16]
    end = f".{digest}.step-{step}"
    return f"{run}.{student_id}"[: _LONGEST_ID - len(end)] + end


class EvaluatorClient:
    """`training.loop.Evaluations` over gRPC; one submission after the other, in a thread of its own.

    Args:
        config: where and what.
        run: name of the run.
        student: whose checkpoints.
        teacher: name of its teacher.
        folder: the student's.

    Raises:
        ConfigurationError: a file of TLS or the token cannot be read.

    """

    def __init__(
        self, config: EvaluatorConfig, *, run: str, student: StudentConfig, teacher: str, folder: Path
    ) -> None:
        self.every_steps = config.every_steps
        self._config, self._run, self._student, self._teacher = config, run, student, teacher
        self._log_path = folder / "evaluations.jsonl"
        self._metadata()  # a token that cannot be read is better known now than in the thread
        assert config.address is not None  # else nobody is asked (`connections.open_evaluator`)
        self._address = config.address
        self._channel = open_channel(self._address, config.tls)
        self._stub = rpc.EvaluatorServiceStub(self._channel)
        self._taken = _taken(self._log_path)
        self._away_since: float | None = None
        self._finished = self._closes = False
        # One thread: checkpoints arrive in the order of their steps, and lines of the log do not interleave.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluations")

    def submit(self, step: int, checkpoint: Path, *, finished: bool = False) -> None:
        """Hands a checkpoint over and returns at once; the same one twice is the same work."""
        self._finished |= finished
        # The full path: the evaluator was started in another folder.
        self._thread.submit(self._send, step, checkpoint.resolve())

    def submit_again(self, step: int, checkpoint: Path) -> None:
        """Hands over what an earlier process of this student had to, unless the log says that it was taken."""
        if evaluation_id_of(self._run, self._student.id, step) not in self._taken:
            self.submit(step, checkpoint)

    def close(self) -> None:
        """Waits for what is under way: patiently if the training has finished, else for one answer to each.

        A training that goes on later hands over again what was not taken.
        """
        self._closes = True
        self._thread.shutdown(wait=True)
        self._channel.close()

    def __enter__(self) -> EvaluatorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, step: int, checkpoint: Path) -> None:
        """Sends one submission, more than once if need be, and writes down what became of it."""
        request, problem = self._request(step, checkpoint), ""
        try:
            for attempt in Retrying(
                stop=self._gives_up,
                wait=wait_fixed(_PAUSE_SECONDS),
                # Of other answers the second is the first: the request itself is refused.
                retry=retry_if_exception(_is_worth_another_try),
                reraise=True,
            ):
                with attempt:
                    try:
                        self._stub.SubmitEvaluation(request, timeout=_TIMEOUT_SECONDS, metadata=self._metadata())
                    except grpc.RpcError as error:
                        raise error_of_rpc(error, self._address, "evaluator") from error
            self._away_since = None
        except TutelageError as error:
            problem = str(error)
            if not _is_worth_another_try(error):
                self._away_since = None
            _log.warning("evaluation %s was not submitted: %s", request.evaluation_id, problem)
        line = {"evaluation_id": request.evaluation_id, "step": step, "submitted": not problem, "error": problem}
        try:
            with self._log_path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:  # In this thread nobody would hear of it.
            _log.warning("%s cannot be written: %s; what it was to say: %s", self._log_path, error, line)

    def _gives_up(self, _state: RetryCallState) -> bool:
        """Whether the evaluator has been away for too long; what is sent next is then tried once."""
        now = time.monotonic()
        self._away_since = self._away_since or now
        return now - self._away_since > _PATIENCE_SECONDS or (self._closes and not self._finished)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((STUDENT_METADATA_KEY, self._student.id), *token_metadata(self._config.token_file))

    def _request(self, step: int, checkpoint: Path) -> pb.SubmitEvaluationRequest:
        student = self._student
        return pb.SubmitEvaluationRequest(
            evaluation_id=evaluation_id_of(self._run, student.id, step),
            checkpoint=str(checkpoint),
            labels=pb.EvaluationLabels(
                run=self._run,
                student=student.id,
                teacher=self._teacher,
                objective=student.objective.label,
                temperature=student.objective.temperature,
                noise=student.objective.noise,
                step=step,
                training_seed=student.seed,
            ),
            tasks=[
                pb.TaskRequest(task=task.task, protocol=task.protocol or "", limit=task.limit)
                for task in self._config.tasks
            ],
            seed=student.seed,
        )


def _taken(log: Path) -> set[str]:
    """The evaluations that the log says were taken; of a line that a kill cut off nothing is known."""
    taken = set()
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with suppress(ValueError):
            entry = json.loads(line)
            if entry["submitted"]:
                taken.add(entry["evaluation_id"])
    return taken
