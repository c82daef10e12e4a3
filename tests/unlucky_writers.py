"""Writers of a student that take their time, and die in the middle of a sequence."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.trainer.rollout.student_copy import StudentWeights
from tutelage.trainer.rollout.writer_actor import WriterActor


def unlucky_writer(folder: Path, *, deaths: int, probability: float, delay_seconds: float) -> type[WriterActor]:
    """A class of writers.

    Args:
        folder: where each death leaves a file.
        deaths: of all of them together, at most.
        probability: of SIGKILL at each piece.
        delay_seconds: before a share is written, at most.

    """

    # In here, so that Ray carries it by value, with what it is told.
    class UnluckyWriter(WriterActor):
        def _take(self, weights: StudentWeights) -> None:
            time.sleep(random.random() * delay_seconds)
            super()._take(weights)
            if not isinstance(self._sampler, _Dying):
                self._sampler = _Dying(self._sampler, folder, deaths, probability)

    return UnluckyWriter


@dataclass
class _Dying:
    sampler: Any
    folder: Path
    deaths: int
    probability: float

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def write(self, *arguments: Any, on_piece: Any = None, **keywords: Any) -> Any:
        def tell(index: int, ids: Any) -> None:
            if on_piece is not None:
                on_piece(index, ids)
            if random.random() < self.probability:
                self.die()

        return self.sampler.write(*arguments, on_piece=tell, **keywords)

    def die(self) -> None:
        for number in range(self.deaths):
            with suppress(FileExistsError):
                (self.folder / f"death-{number}").touch(exist_ok=False)
                time.sleep(0.05)  # what it has handed on arrives
                os.kill(os.getpid(), signal.SIGKILL)
