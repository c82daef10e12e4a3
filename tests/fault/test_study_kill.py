"""A study whose driver is killed with -9: `resume` completes it, does no cell twice, and doubles no row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from study_cases import write_study
from tutelage.runtime.processes import left_behind

ROOT = Path(__file__).resolve().parents[2]
STUDY = "import sys; from tutelage.study.cli import main; sys.exit(main(sys.argv[1:]))"
MARK = "TUTELAGE_TEST_STUDY"
SLOW = {
    "steps": 60,
    "save_every_steps": 5,
    "batch": {"sequences": 16, "micro_batch_sequences": 16, "max_tokens": 96},
    "held_out": {"sequences": 4, "every_steps": 60},
}


def start(command: str, file: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "proto"), MARK: file.parent.name}
    return subprocess.Popen(
        [sys.executable, "-c", STUDY, command, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], object], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_killed_driver_costs_at_most_the_steps_since_a_checkpoint(tiny_model, tmp_path):
    # One after the other: the first is finished, the second under way when the driver dies.
    file = write_study(tmp_path, tiny_model, concurrency=1, settings=SLOW)
    run = tmp_path / "run"
    driver = start("run", file)
    try:
        wait_until(lambda: any(run.glob("students/*-s1-*/checkpoints/step-*/MANIFEST.json")))
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
    wait_until(lambda: not left_behind(MARK, tmp_path.name), seconds=40)
    (first,) = run.glob("students/*-s0-*/checkpoints/step-00000060")
    trained_at = first.stat().st_mtime_ns

    resumed = start("resume", file)
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output.decode()

    assert first.stat().st_mtime_ns == trained_at
    assert all(steps(path) == list(range(61)) for path in run.glob("students/*/metrics.jsonl"))
    frames = pl.read_parquet(run / "frames" / "**" / "*.parquet", hive_partitioning=True)
    assert not frames.select("evaluation_id", "task", "item_id").is_duplicated().any()
    assert frames.group_by("student", "training_seed", "step").len()["len"].to_list() == [6, 6, 6]
    assert len(list((run / "cells").glob("*.json"))) == 3
    assert left_behind(MARK, tmp_path.name) == []

    said_at = (run / "logs" / "evaluator.log").stat().st_mtime_ns
    again = start("run", file)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output.decode()
    assert b"all 3 cells are done" in output
    assert (run / "logs" / "evaluator.log").stat().st_mtime_ns == said_at, "nothing was left to serve"
    assert first.stat().st_mtime_ns == trained_at
