"""An environment of its own for TRL 1.16.0, made once below `build/`, and its side of a comparison as a process.

TRL trains when it is told to, one step a line, so that its steps can take turns with ours on the same cores.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environments import ROOT, python_of

_REQUIREMENTS = ("trl==1.16.0", "torch==2.13.0", "transformers==5.19.0")
_LOG = ROOT / "build" / "trl.log"


def trl_python() -> Path:
    """The interpreter that has TRL."""
    return python_of("trl-1.16.0", _REQUIREMENTS)


class Trl:
    """A `trl_side.py` that waits to be told to step."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def step(self) -> dict[str, Any]:
        """Takes one optimizer step and says how long it took and what it was."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            SystemExit: it ended.

        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"TRL ended; see {_LOG}")
        return dict(json.loads(line))


@contextmanager
def trl(*arguments: str, threads: int) -> Iterator[Trl]:
    """A process that has loaded its models; it ends with the block."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
    command = [str(trl_python()), str(ROOT / "benchmarks" / "trl_side.py"), *arguments, "--threads", str(threads)]
    with _LOG.open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        side = Trl(process)
        side.answer()
        yield side
    finally:
        process.kill()
        process.wait()
