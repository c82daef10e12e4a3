"""Trainings by several workers on this machine: processes with a gloo group between them, and nothing of Ray."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer_doubles import InProcessTeacher
from tutelage.trainer.config.student import OptimizerConfig, StudentConfig
from tutelage.trainer.data.sequences import token_sequence
from tutelage.trainer.metrics.progress import Progress
from tutelage.trainer.model.process_group import workers_of_process_group
from tutelage.trainer.model.student import Student
from tutelage.trainer.training.control import Control
from tutelage.trainer.training.loop import train


@dataclass(frozen=True)
class Case:
    config: StudentConfig
    folder: Path
    stop_after: int = 1_000_000
    """Steps after which it is asked to stop."""

    def train(self, teacher: InProcessTeacher, **changes) -> None:
        control = Control()

        def report(progress: Progress) -> None:
            if progress.step >= self.stop_after:
                control.stop()

        train(self.config, folder=self.folder, teacher=teacher, report=report, control=control, **changes)


def start(cases: Sequence[Case], count: int, tiny_model: Path, scratch: Path):
    """Starts `count` workers that train the cases one after the other; `join` until it is true."""
    return multiprocessing.spawn(_work, (count, list(cases), tiny_model, scratch), nprocs=count, join=False)


def sequences_scored(scratch: Path, rank: int) -> int:
    """How many sequences that worker asked its teacher for."""
    return int((scratch / f"scored-{rank}").read_text())


def _work(rank: int, count: int, cases: list[Case], tiny_model: Path, scratch: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=count)
    teacher = InProcessTeacher(tiny_model)
    for case in cases:
        case.train(teacher, workers=workers_of_process_group())
    (scratch / f"scored-{rank}").write_text(str(teacher.sequences_scored))
    (scratch / f"sharded-{rank}.json").write_text(json.dumps(_sharded_alone(tiny_model, rank)))
    dist.destroy_process_group()


def sharded_alone(scratch: Path, rank: int) -> dict[str, Any]:
    """What that worker found of a sharded student outside of a training; see `_sharded_alone`."""
    found: dict[str, Any] = json.loads((scratch / f"sharded-{rank}.json").read_text())
    return found


def _sharded_alone(tiny_model: Path, rank: int) -> dict[str, Any]:
    student = Student(tiny_model, dtype="bfloat16", optimizer=OptimizerConfig(), vocabulary_size=512, sharded=True)
    _backward(student, 1.0)
    gradients = _bytes_here(weight.grad for weight in student.model.parameters())
    student.step(1e-3)
    states = student._optimizer.state.values()
    found = {
        "weights": student.parameters_count,
        "weight_bytes": _bytes_here(student.model.parameters()),
        "gradient_bytes": gradients,
        "moment_bytes": _bytes_here(state[key] for state in states for key in ("exp_avg", "exp_avg_sq")),
    }
    try:  # Only one worker's loss is not finite.
        _backward(student, 1.0 if rank else float("nan"))
        student.step(1e-3)
    except RuntimeError as error:
        found["refusal"] = str(error)
    return found


def _backward(student: Student, weight: float) -> None:
    sequence = token_sequence(torch.arange(40, 50).numpy(), torch.arange(50, 60).numpy(), loss_on_prompt=True)
    (student.hidden([sequence]) * weight).sum().backward()


def _bytes_here(tensors: Iterable[Tensor]) -> int:
    """What lies in this process of tensors all of which are sharded."""
    parts = [tensor.to_local() for tensor in tensors if isinstance(tensor, DTensor)]
    return sum(part.nbytes for part in parts)
