"""Trainings by several workers on this machine: processes with a gloo group between them, and nothing of Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from trainer_doubles import InProcessTeacher

from trainer.config import StudentConfig
from trainer.control import Control
from trainer.loop import train
from trainer.parallel import workers_of_process_group
from trainer.progress import Progress


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
    dist.destroy_process_group()
