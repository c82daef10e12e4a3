"""Cohorts of two tiny students as `tutelage train` processes, for tests that kill."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from trainer_cases import metric_rows, write_rows
from tutelage.trainer.model.layer_pruning import prune_layers

_COMMAND = [sys.executable, "-c", "import sys; from tutelage.cli import main; sys.exit(main())"]


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `tutelage` command in a process group of its own, which is gone afterwards."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*_COMMAND, *arguments], stdout=stream, stderr=stream, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float, log: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"waited in vain; {log}:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    # Up to the last whole line: another may be being written.
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def process_of(folder: Path) -> int:
    """Who trains the student, as its lock says."""
    match = re.search(r"process (\d+)", (folder / "lock").read_text())
    return int(match[1]) if match else 0


def write_cohort(tmp_path: Path, tiny_model: Path, address: str, steps: int) -> Path:
    prune_layers(tiny_model, tmp_path / "init", layers=2)
    write_rows(tmp_path / "rows.jsonl")
    topk = {"name": "forward_kl", "signal": "topk", "k": 16, "temperature": 2.0}
    cohort = {
        "run": f"test-{os.getpid()}",
        "output": str(tmp_path / "run"),
        "teacher": {"address": address, "wait_seconds": 150},
        "defaults": {
            "init": str(tmp_path / "init"),
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "batch": {"sequences": 4, "max_tokens": 96},
            "sampling": {"max_new_tokens": 12},
            "held_out": {"sequences": 4, "every_steps": 20},
            "steps": steps,
            "save_every_steps": 5,
        },
        "students": [{"id": "ann"}, {"id": "bob", "objective": topk}],
    }
    path = tmp_path / "cohort.yaml"
    path.write_text(yaml.safe_dump(cohort))
    return path


def assert_finished(tmp_path: Path, steps: int, students: Sequence[str] = ("ann", "bob")) -> None:
    for student in students:
        rows = metric_rows(tmp_path / "run" / "students" / student)
        assert [row["step"] for row in rows] == list(range(steps + 1)), student
        assert (tmp_path / "run/students" / student / f"checkpoints/step-{steps:08d}/MANIFEST.json").exists()


def free_port() -> int:
    """For who binds it later: below those that the system gives away meanwhile, above those of Ray's workers."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
