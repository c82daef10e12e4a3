"""A teacher double around a real tiny model, as a process that can be killed.

python tests/killable_teacher.py MODEL HOST:PORT
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class KillableTeacher:
    """Started anew at the same address whenever it was killed."""

    def __init__(self, model: Path, address: str) -> None:
        self._command = [sys.executable, __file__, str(model), address]
        self._environment = os.environ | {"PYTHONPATH": f"{ROOT / 'proto'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, env=self._environment, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextmanager
def killable_teacher(model: Path, address: str) -> Iterator[KillableTeacher]:
    """A running teacher; gone at the end of the block."""
    teacher = KillableTeacher(model, address)
    try:
        yield teacher
    finally:
        teacher.kill()


def main(model: Path, address: str) -> None:
    import torch

    from trainer_doubles import FaultyServicer, InProcessTeacher, serving

    torch.set_num_threads(1)
    with serving(FaultyServicer(InProcessTeacher(model), model), address):
        print("serving", flush=True)
        signal.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
