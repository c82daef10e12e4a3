"""Asking a served evaluator: submit, list, wait, cancel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tutelage.data.hub import require_model_name
from tutelage.errors import NotFound
from tutelage.evaluator.config import ServiceConfig, WaitConfig
from tutelage.evaluator.runner.requests import Evaluation, Labels
from tutelage.rpc.transport import STUDENT_METADATA_KEY, ask
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as pb_grpc

_ENDED = (pb.EVALUATION_STATE_DONE, pb.EVALUATION_STATE_FAILED, pb.EVALUATION_STATE_CANCELLED)


def submit(evaluation: Evaluation, config: ServiceConfig) -> str:
    """Queues an evaluation and returns its state; the same one again is the same.

    Raises:
        CheckpointError: the checkpoint is no folder, and no name of a model on the hub.
        TutelageError: no answer, or a refusal.

    """
    require_model_name(evaluation.checkpoint, "checkpoint")
    request = pb.SubmitEvaluationRequest(
        evaluation_id=evaluation.evaluation_id,
        checkpoint=_full(evaluation.checkpoint),
        labels=pb.EvaluationLabels(**{name: getattr(evaluation.labels, name) for name in Labels.__dataclass_fields__}),
        tasks=[
            pb.TaskRequest(task=_task(one.task), protocol=one.protocol, limit=one.limit) for one in evaluation.tasks
        ],
        seed=evaluation.seed,
    )
    # A token may be a student's own.
    student = ((STUDENT_METADATA_KEY, evaluation.labels.student),) if config.token_file else ()
    return state_of(_ask("SubmitEvaluation", request, config, student))


def _full(checkpoint: Path) -> str:
    """The whole path of a folder, since the service was started in another one; a name on the hub is none."""
    return str(checkpoint.resolve() if checkpoint.is_dir() else checkpoint)


def _task(name: str) -> str:
    return str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name


def known(config: ServiceConfig, run: str = "") -> Sequence[pb.EvaluationStatus]:
    """All evaluations of a run, or all, the oldest first.

    Raises:
        TutelageError: no answer, or a refusal.

    """
    statuses: Sequence[pb.EvaluationStatus] = _ask(
        "ListEvaluations", pb.ListEvaluationsRequest(run=run), config
    ).evaluations
    return statuses


def ended(config: WaitConfig) -> Iterator[pb.EvaluationStatus]:
    """The evaluations that are waited for, each once, when it has ended.

    Raises:
        NotFound: the service knows none of that name or run.
        TutelageError: no answer, or a refusal.

    """
    told: set[str] = set()
    while True:
        statuses = [one for one in known(config, config.run) if config.evaluation_id in (None, one.evaluation_id)]
        if not statuses:
            asked = config.evaluation_id or config.run
            raise NotFound(f"there is no evaluation {asked}".rstrip() + "; submit it first", "evaluation_id")
        for status in statuses:
            if status.state in _ENDED and status.evaluation_id not in told:
                told.add(status.evaluation_id)
                yield status
        if all(status.state in _ENDED for status in statuses):
            return
        time.sleep(config.poll_seconds)


def cancel(evaluation_id: str, config: ServiceConfig) -> str:
    """Ends an evaluation that waits or runs, and returns its state.

    Raises:
        NotFound: the service knows none of that name.
        TutelageError: no answer, or a refusal.

    """
    return state_of(_ask("CancelEvaluation", pb.CancelEvaluationRequest(evaluation_id=evaluation_id), config))


def state_of(message: Any) -> str:
    """A state in a word: queued, running, done, failed, cancelled."""
    return pb.EvaluationState.Name(message.state).removeprefix("EVALUATION_STATE_").lower()


def _ask(method: str, request: Any, config: ServiceConfig, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
    return ask(
        pb_grpc.EvaluatorServiceStub,
        method,
        request,
        config.address,
        server="evaluator",
        timeout_seconds=config.timeout_seconds,
        access=config,
        metadata=metadata,
    )
