"""What is refused, and what a person is then told to do; nothing that was there before is lost.

| given | answer |
|---|---|
| a student with another tokenizer of the same size | refused at connect, the differing fields named |
| a teacher that answers at other temperatures than the run's | refused before a loss |
| a temperature that is none | refused by the configuration |
| noise with `topk` | refused by the configuration |
| reverse KL on the teacher's top k | refused by the configuration |
| `../` in a student's id | refused by the configuration |
| a student that another process trains | refused, the process named; free when that one is dead |
| a full disk in the middle of a save or of a row of metrics | ends with an error; goes on from the last checkpoint |
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.config import validate
from tutelage.errors import CheckpointError, ConfigurationError, Conflict, CorruptFrame, IdentityMismatch
from tutelage.identity import tokenizer_digests
from tutelage.rpc import codec
from tutelage.trainer.checkpoint.run_lock import folder_lock
from tutelage.trainer.checkpoint.store import CheckpointStore
from tutelage.trainer.cluster.student_actor import StudentActor
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.metrics.progress import Progress
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.training.loop import train


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> InProcessTeacher:
    return InProcessTeacher(tiny_model)


@pytest.fixture(scope="module")
def init(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    prune_layers(tiny_model, folder, layers=2)
    return folder


def cohort(**student: Any) -> CohortConfig:
    values = {"id": "ann", "init": "student", "data": {"path": "rows.jsonl"}} | student
    return validate(CohortConfig, {"students": [values]})


def client_of(address: str, model: Path) -> TeacherClient:
    return TeacherClient(address, student_id="ann", wait_seconds=5, tokenizer_digests=tokenizer_digests(model))


def test_another_tokenizer(teacher, tiny_model, tmp_path):
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with (
        serving(FaultyServicer(teacher, tiny_model)) as address,
        pytest.raises(IdentityMismatch, match=r"differ in vocabulary; .*Use a student with the teacher's tokenizer"),
    ):
        client_of(address, tmp_path)


def test_temperature_off_the_grid(teacher, init, tiny_model, tmp_path):
    """Every run asks for log-sum-exp at its own temperature; nothing is made of that at another one."""

    def add_a_temperature(responses):
        for response in responses:
            columns = codec.decode(response.frame.logsumexp).repeat(2, axis=1)
            response.frame.logsumexp.CopyFrom(codec.encode(columns))
            response.frame.checksum = codec.frame_checksum(response.frame)
        return responses

    objective = {"name": "forward_kl", "signal": "topk", "k": 8, "temperature": 2.0}
    config = student_config(
        init, write_rows(tmp_path / "rows.jsonl"), objective=objective, held_out={"sequences": 0}, steps=1
    )
    servicer = FaultyServicer(teacher, tiny_model)
    servicer.mischief = add_a_temperature
    with (
        serving(servicer) as address,
        client_of(address, init) as client,
        pytest.raises(CorruptFrame, match="logsumexp"),
    ):
        train(config, folder=tmp_path / "student", teacher=client)
    with pytest.raises(ConfigurationError, match=r"temperature.* greater than 0"):
        cohort(objective={"name": "forward_kl", "temperature": 0.0})


def test_noise_with_topk():
    with pytest.raises(ConfigurationError, match="use hidden, or say approximate: true"):
        cohort(objective={"name": "forward_kl", "signal": "topk", "noise": 1.0})


def test_reverse_kl_on_the_teachers_topk():
    with pytest.raises(ConfigurationError, match=r"different objective.* use hidden or candidates"):
        cohort(objective={"name": "reverse_kl", "signal": "topk"})


@pytest.mark.parametrize("name", ["../ann", "ann/../../bob", "/tmp/ann", "", "ann\0", "Ann", "a" * 65])
def test_id_that_leads_elsewhere(name):
    with pytest.raises(ConfigurationError, match=r"is not a name; use 1 to 64 of a-z, 0-9"):
        cohort(id=name)


_HOLDER = """
import sys, time
from pathlib import Path
from tutelage.trainer.checkpoint.run_lock import folder_lock
with folder_lock(Path(sys.argv[1]), advice="wait", field="output"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes(init, tmp_path):
    config = plain_config(init, tmp_path, steps=1)
    folder = tmp_path / "student"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Conflict, match=f"process {holder.pid} .*give this student another id"):
            train(config, folder=folder, teacher=None)
        holder.send_signal(signal.SIGKILL)
    assert train(config, folder=folder, teacher=None).finished


def test_a_student_on_ray_waits_for_its_predecessor_to_end(init, tmp_path):
    """Ray starts a student again whose host is cut off, where its process is still alive."""
    student = plain_config(init, tmp_path, steps=1)
    config = CohortConfig(teacher=None, output=tmp_path / "run", students=(student,))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _HOLDER, str(config.folder("ann"))]
    phases: list[str] = []

    class Follower(StudentActor):
        def take_progress(self, progress: Progress) -> None:
            super().take_progress(progress)
            phases.append(progress.phase)
            if progress.phase.startswith("waiting for"):
                holder.send_signal(signal.SIGKILL)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == "held\n"
        outcome = Follower(config, "ann").run()
    assert outcome.finished
    predecessor = f"process {holder.pid} on {socket.gethostname()}"
    assert phases[1] == f"waiting for the end of {predecessor}, which trains this student"


def test_a_student_that_waits_for_its_predecessor_can_be_stopped(init, tmp_path):
    student = plain_config(init, tmp_path, steps=1)
    config = CohortConfig(teacher=None, output=tmp_path / "run", students=(student,))
    actor = StudentActor(config, "ann")
    actor.stop()
    with folder_lock(config.folder("ann"), advice="wait", field="output"):
        assert not actor.run().finished


@pytest.fixture(scope="module")
def whole(init: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    train(plain_config(init, folder), folder=folder, teacher=None)
    return folder


def plain_config(init: Path, folder: Path, **changes: Any) -> StudentConfig:
    batch = {"sequences": 2, "micro_batch_sequences": 2}
    values = {"objective": {"name": "sft"}, "held_out": {"sequences": 0}, "batch": batch, "save_every_steps": 2}
    return student_config(init, write_rows(folder / "rows.jsonl"), **(values | changes))


Limit = Callable[[Path], int]
_FULL: dict[str, tuple[str, Limit]] = {
    "the weights": ("saving", lambda folder: 100_000),
    "the optimizer": ("saving", lambda folder: 2_000_000),
    "a row of metrics": ("stepping", lambda folder: (folder / "metrics.jsonl").stat().st_size + 40),
}
"""From which phase on no file may be longer than so many bytes."""


@pytest.mark.parametrize("part", _FULL)
def test_full_disk(part, whole, init, tmp_path):
    """RLIMIT_FSIZE cuts a write off in the middle as a full disk does, with another number (EFBIG)."""
    config = plain_config(init, tmp_path)
    phase, limit = _FULL[part]
    folder = tmp_path / "student"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(progress: Progress) -> None:
        if progress.step == 4 and progress.phase == phase:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit(folder), hard))

    try:
        with pytest.raises(CheckpointError, match=r"File too large.* make room and start again"):
            train(config, folder=folder, teacher=None, report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000004"][: 2 if phase == "stepping" else 1]
    latest = CheckpointStore(folder / "checkpoints", keep=2).latest()
    assert latest is not None
    assert latest.path.name == checkpoints[-1]
    resumed = train(config, folder=folder, teacher=None)
    assert metric_rows(folder) == metric_rows(whole)
    for name in ("model.safetensors", "trainer_state.st"):
        mine, theirs = (load_file(path / name) for path in (resumed.checkpoint, whole / "checkpoints/step-00000006"))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())
