"""The teacher and evaluator servers of a study, and what they are asked beside training: counters, scores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from tutelage.errors import TutelageError
from tutelage.files import write_durably
from tutelage.rpc.tls import ClientAccess
from tutelage.rpc.transport import ask, error_of_rpc, open_channel, token_metadata
from tutelage.rpc.v1 import evaluator_pb2 as epb
from tutelage.rpc.v1 import evaluator_pb2_grpc as erpc
from tutelage.rpc.v1 import teacher_pb2 as tpb
from tutelage.rpc.v1 import teacher_pb2_grpc as trpc
from tutelage.runtime.programs import shared_machine
from tutelage.study.cells import Cell
from tutelage.study.config import EvaluationConfig, TeacherConfig
from tutelage.study.folder import Folder
from tutelage.up import services
from tutelage.up.services import Service

_TIMEOUT_SECONDS = 30.0  # it answers from memory


def serve_teacher(
    name: str, teacher: TeacherConfig, model: Path, folder: Folder, *, writes: bool, store: bool
) -> Service:
    """Starts a teacher, or attaches to one that is served already."""
    if teacher.address is not None:
        return Service(f"teacher-{name}", folder.path("logs"), None, address=teacher.address)
    options: dict[str, Any] = {"model": model, "served_model_name": name}
    options["roles"] = "score,write" if writes else "score"
    if store:
        options |= {"store.path": folder.path("store")}
    options |= teacher.serve
    return services.serve_teacher(f"teacher-{name}", folder.path("logs"), options, environment=shared_machine())


def note_usage(name: str, address: str, access: ClientAccess, folder: Folder) -> None:
    """Writes what a teacher counted since its start, one file a start; a teacher that is away is left out."""
    request = tpb.GetTeacherUsageRequest()
    try:
        usage = ask(
            trpc.TeacherServiceStub,
            "GetTeacherUsage",
            request,
            address,
            server="teacher",
            timeout_seconds=_TIMEOUT_SECONDS,
            access=access,
        )
    except TutelageError:
        return
    path = folder.path("usage", f"{name}-{usage.instance_id}.json")
    content = MessageToDict(usage, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    write_durably(path, json.dumps({"teacher": name, **content}) + "\n")


class Evaluator:
    """The evaluator of a study: takes checkpoints, says which are scored.

    Args:
        config: what to measure.
        folder: the study's.
        run: name of the study.

    """

    def __init__(self, config: EvaluationConfig, folder: Folder, run: str) -> None:
        self._config, self._run = config, run
        logs = folder.path("logs")
        options = {"frames": folder.path("frames"), "queue": folder.path("queue"), **config.serve}
        self._service = (
            Service("evaluator", logs, None, address=config.address)
            if config.address
            else services.serve_evaluator(logs, options, environment=shared_machine())
        )
        self._channel: grpc.Channel | None = None

    def submit(self, cell: Cell, evaluation_id: str, checkpoint: Path, *, step: int) -> None:
        """Queues the scoring of a cell; again is the same.

        Raises:
            TutelageError: the evaluator refuses it.

        """
        labels = epb.EvaluationLabels(
            run=self._run,
            student=cell.model,
            teacher=cell.teacher,
            # Two methods may have one objective, and their rows must not be taken for each other's.
            objective=cell.method or cell.objective,
            temperature=cell.temperature,
            noise=cell.noise,
            step=step,
            training_seed=cell.seed,
        )
        tasks = [
            epb.TaskRequest(task=one.task, protocol=one.protocol or "", limit=one.limit) for one in self._config.tasks
        ]
        request = epb.SubmitEvaluationRequest(
            evaluation_id=evaluation_id, checkpoint=str(checkpoint), labels=labels, tasks=tasks, seed=cell.seed
        )
        self._call("SubmitEvaluation", request)

    def scored(self) -> Iterable[epb.EvaluationStatus]:
        """Evaluations whose rows are all in the frames.

        Raises:
            TutelageError: one failed; the message says why.

        """
        for status in self._call("ListEvaluations", epb.ListEvaluationsRequest(run=self._run)).evaluations:
            if status.state in (epb.EVALUATION_STATE_FAILED, epb.EVALUATION_STATE_CANCELLED):
                raise TutelageError(f"evaluation {status.evaluation_id} failed: {status.error}", "evaluation")
            if status.state == epb.EVALUATION_STATE_DONE:
                yield status

    def revive(self) -> str:
        """Starts it again if it has ended; says so."""
        return self._service.revive()

    def close(self) -> None:
        """Ends the server."""
        if self._channel is not None:
            self._channel.close()
        self._service.close()

    def _call(self, method: str, request: Any) -> Any:
        if self._channel is None:
            self._channel = open_channel(self._service.address, self._config.tls)
        try:
            metadata = token_metadata(self._config.token_file)
            stub = erpc.EvaluatorServiceStub(self._channel)
            return getattr(stub, method)(request, timeout=_TIMEOUT_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            raise error_of_rpc(error, self._service.address, "evaluator") from error
