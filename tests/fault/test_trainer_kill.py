"""Kill -9 of a teacher and of trainers in the middle of `tutelage train`: everybody finishes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from trainer_cases import metric_rows, write_rows
from trainer_doubles import FaultyServicer, InProcessTeacher, serving

from trainer.carve import carve

_COMMAND = [sys.executable, "-c", "import sys; from tutelage.command import main; sys.exit(main())"]


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
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


def write_cohort(tmp_path: Path, tiny_model: Path, address: str, steps: int) -> Path:
    carve(tiny_model, tmp_path / "init", layers=2)
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


def assert_finished(tmp_path: Path, steps: int) -> None:
    for student in ("ann", "bob"):
        rows = metric_rows(tmp_path / "run" / "students" / student)
        assert [row["step"] for row in rows] == list(range(steps + 1)), student
        assert (tmp_path / "run/students" / student / f"checkpoints/step-{steps:08d}/MANIFEST.json").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_killed_trainers_go_on_from_their_checkpoints_and_an_interrupt_leaves_nothing(tiny_model, tmp_path):
    steps = 40
    log = tmp_path / "log"
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as address:
        cohort = write_cohort(tmp_path, tiny_model, address, steps)
        ann = tmp_path / "run/students/ann"
        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(lambda: steps_done(ann) >= 12, 120, log, train)
            victim = int(re.search(r"process (\d+)", (ann / "lock").read_text())[1])
            os.kill(victim, signal.SIGKILL)
            killed_at = time.monotonic()
            wait_until(lambda: f"process {victim} " not in (ann / "lock").read_text(), 60, log, train)
            restart_seconds = time.monotonic() - killed_at
            assert train.wait(120) == 0, log.read_text()[-3000:]
        assert_finished(tmp_path, steps)
        assert restart_seconds < 30

        # Interrupted, a run ends with 130 and leaves no process.
        longer = yaml.safe_load(cohort.read_text())
        longer |= {"run": longer["run"] + "-long", "output": str(tmp_path / "long"), "students": [{"id": "ann"}]}
        longer["defaults"]["steps"] = 5000
        cohort.write_text(yaml.safe_dump(longer))
        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(lambda: steps_done(tmp_path / "long/students/ann") >= 2, 120, log, train)
            family = psutil.Process(train.pid).children(recursive=True)
            assert family
            os.killpg(train.pid, signal.SIGINT)  # As a terminal does: the whole group gets it.
            assert train.wait(60) == 130, log.read_text()[-3000:]
            _, alive = psutil.wait_procs(family, timeout=20)
            assert not alive


def test_a_killed_teacher_that_comes_back_costs_only_time(tiny_model, tmp_path):
    steps = 150
    log = tmp_path / "log"
    address = f"127.0.0.1:{free_port()}"
    serve = ["teacher", "serve", "--model", str(tiny_model), "--address", address, "--max-sequence-tokens", "256"]
    serve += ["--kv-cache-gib", "0.2"]
    folders = [tmp_path / "run/students" / student for student in ("ann", "bob")]
    cohort = write_cohort(tmp_path, tiny_model, address, steps)
    with running(["train", "--config", str(cohort)], log) as train:
        with running(serve, tmp_path / "teacher-1.log") as teacher:
            wait_until(lambda: min(map(steps_done, folders)) >= 8, 120, log, train)
            os.killpg(teacher.pid, signal.SIGKILL)
            teacher.wait()
            before = [steps_done(folder) for folder in folders]
        assert max(before) < steps
        with running(serve, tmp_path / "teacher-2.log"):
            assert train.wait(150) == 0, log.read_text()[-3000:]
    assert_finished(tmp_path, steps)
    waited = [
        sum(json.loads(line).get("seconds/waiting", 0) for line in (folder / "metrics.jsonl").read_text().splitlines())
        for folder in folders
    ]
    assert min(waited) > 1
