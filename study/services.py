"""The teacher and evaluator servers of a study, and what they are asked beside training: counters, scores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from subprocess import Popen
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from tutelage.errors import TutelageError
from tutelage.files import write_durably
from tutelage.rpc.transport import ask, error_of_rpc, open_channel
from tutelage.rpc.v1 import evaluator_pb2 as epb
from tutelage.rpc.v1 import evaluator_pb2_grpc as erpc
from tutelage.rpc.v1 import teacher_pb2 as tpb
from tutelage.rpc.v1 import teacher_pb2_grpc as trpc
from tutelage.runtime.processes import start, stop, wait_for_file
from tutelage.study.cells import Cell
from tutelage.study.config import EvaluationConfig, TeacherConfig
from tutelage.study.folder import Folder
from tutelage.study.programs import environment, flags, tutelage

# A large teacher is read from disk and hashed before it serves; what is asked then answers from memory.
_READY_SECONDS, _TIMEOUT_SECONDS = 600.0, 30.0


class Service:
    """A server that the study starts, or one that is there already.

    Args:
        name: for people and for the files that it leaves.
        folder: the study's.
        command: what to start; None attaches to `address`.
        address: host:port of what is there.

    """

    def __init__(self, name: str, folder: Folder, command: list[str] | None, address: str = "") -> None:
        self.name, self._folder, self._address = name, folder, address
        self._log, self._address_file = folder.path("logs", f"{name}.log"), folder.path("logs", f"{name}.address")
        self._process: Popen[bytes] | None = None
        if command is not None:
            self._address_file.unlink(missing_ok=True)  # an earlier run's would be taken for the new server's
            options = ["--address-file", str(self._address_file)]
            self._process = start([*command, *options], log=self._log, environment=environment())

    @property
    def address(self) -> str:
        """host:port, once it serves.

        Raises:
            Unreachable: it ended or did not get ready; the end of its log is in the message.

        """
        if not self._address:
            assert self._process is not None
            self._address = wait_for_file(self._address_file, self._process, log=self._log, seconds=_READY_SECONDS)
        return self._address

    def close(self) -> None:
        """Ends what was started."""
        if self._process is not None:
            stop(self._process)


def serve_teacher(
    name: str, teacher: TeacherConfig, model: Path, folder: Folder, *, writes: bool, store: bool
) -> Service:
    """Starts a teacher, or attaches to one that is served already."""
    if teacher.address is not None:
        return Service(f"teacher-{name}", folder, None, teacher.address)
    options: dict[str, Any] = {"model": model, "port": 0, "served_model_name": name}
    options["roles"] = "score,write" if writes else "score"
    if store:
        options |= {"store.path": folder.path("store")}
    return Service(f"teacher-{name}", folder, [*tutelage("teacher", "serve"), *flags(options), *flags(teacher.serve)])


def note_usage(name: str, address: str, folder: Folder) -> None:
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
        options = {"port": 0, "frames": folder.path("frames"), "queue": folder.path("queue")}
        command = [*tutelage("evaluate", "serve"), *flags(options), *flags(config.serve)]
        self._service = Service("evaluator", folder, command)
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

    def close(self) -> None:
        """Ends the server."""
        if self._channel is not None:
            self._channel.close()
        self._service.close()

    def _call(self, method: str, request: Any) -> Any:
        if self._channel is None:
            self._channel = open_channel(self._service.address)
        try:
            return getattr(erpc.EvaluatorServiceStub(self._channel), method)(request, timeout=_TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            raise error_of_rpc(error, self._service.address, "evaluator") from error
