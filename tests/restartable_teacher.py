"""A teacher around an engine double, in a process that can be killed and is back in milliseconds.

`python tests/restartable_teacher.py` imports everything once and then forks a server for each line of its standard
input, which names the address; it answers with the server's process id and address.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FRAME_BYTES = 2000  # so that an answer has several


@dataclass
class RestartableTeacher:
    forks: subprocess.Popen[str]
    address: str = "127.0.0.1:0"
    process_id: int = 0

    def start(self) -> None:
        """Starts it, again at the address that it had; what ran before must be dead or dying."""
        assert self.forks.stdin is not None
        assert self.forks.stdout is not None
        print(self.address, file=self.forks.stdin, flush=True)
        process_id, self.address = self.forks.stdout.readline().split()
        self.process_id = int(process_id)

    def signal(self, number: int) -> None:
        os.kill(self.process_id, number)


@contextmanager
def restartable_teacher() -> Iterator[RestartableTeacher]:
    """A running teacher; ended at the end of the block."""
    path = f"{ROOT / 'proto'}:{ROOT / 'tests'}"
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as forks:
        teacher = RestartableTeacher(forks)
        teacher.start()
        try:
            yield teacher
        finally:
            assert forks.stdin is not None
            forks.stdin.close()  # it kills what it forked


async def _serve(address: str) -> None:
    from fake_teacher import FakeScoringEngine, fake_teacher, serving

    teacher = fake_teacher(FakeScoringEngine(seconds=0.02, parallel=1), frame_bytes=FRAME_BYTES)
    async with serving(teacher, address=address) as server:
        print(os.getpid(), server.address, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    import signal

    import fake_teacher  # noqa: F401  (torch and gRPC, before the fork)

    child = 0
    for line in sys.stdin:
        if child:
            os.waitpid(child, 0)
        child = os.fork()
        if child == 0:
            asyncio.run(_serve(line.strip()))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
