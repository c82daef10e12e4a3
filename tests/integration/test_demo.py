"""The demonstration with a tiny teacher: every service for real, in one command, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tutelage.runtime.processes import left_behind

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
STUDENTS = ("gkd", "forward-kl")


def start_demo(tiny_model: Path, runs: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(DEPLOY / "demo.py"), "--teacher", str(tiny_model), "--runs", str(runs)]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run, and what the command printed."""
    runs = tmp_path_factory.mktemp("runs")
    demo = start_demo(tiny_model, runs)
    try:
        output, _ = demo.communicate(timeout=280)
    finally:
        demo.terminate()  # which ends what it started
    assert demo.returncode == 0, output
    return next(runs.iterdir()), output


def test_it_says_where_the_results_are_and_leaves_no_process(finished):
    run, output = finished
    assert str(run / "report.html") in output.replace("\n", "")
    assert (run / "report.html").stat().st_size > 10_000
    assert left_behind("TUTELAGE_DEMO", str(run)) == []


def test_both_students_were_attached_to_one_teacher_that_was_started_once(finished):
    run, _ = finished
    usage = json.loads((run / "teacher_usage.json").read_text())
    counters = {student["student_id"]: student for student in usage["students"]}
    assert set(counters) == {f"demo.{student}" for student in STUDENTS}
    assert all(int(student["sequences"]) > 0 and int(student["bytes"]) > 0 for student in counters.values())
    first_step = min(rows(run, student)[0]["time_seconds"] for student in STUDENTS)
    assert usage["started_at_seconds"] < first_step
    # The two trained at the same time, not one after the other.
    assert max(rows(run, s)[0]["time_seconds"] for s in STUDENTS) < min(
        rows(run, s)[-1]["time_seconds"] for s in STUDENTS
    )


def test_the_students_come_closer_to_the_teacher(finished):
    run, _ = finished
    for student in STUDENTS:
        measured = [row["heldout/forward_kl"] for row in rows(run, student) if "heldout/forward_kl" in row]
        assert measured[-1] < measured[0]


def test_the_frames_have_the_declared_schema_and_a_row_for_every_item(finished):
    import polars as pl

    from tutelage.evaluator.results.frames import SCHEMA, read

    run, _ = finished
    frame = read(run / "frames").collect()
    assert frame.schema == SCHEMA
    items = frame.group_by("student", "step", "task").agg(pl.col("item_id").n_unique(), rows=pl.len())
    assert items.filter(pl.col("item_id") != pl.col("rows")).is_empty()
    assert set(frame.select("student", "step").unique().rows()) == {
        ("teacher", 0),
        *((student, step) for student in STUDENTS for step in (0, 24)),
    }


def rows(run: Path, student: str) -> list[dict[str, float]]:
    lines = (run / "students" / student / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_an_interrupt_stops_everything(tiny_model, tmp_path):
    demo = start_demo(tiny_model, tmp_path)
    deadline = time.monotonic() + 120
    try:
        while len(left_behind("TUTELAGE_DEMO", mark(tmp_path))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(demo.pid, signal.SIGINT)
        output, _ = demo.communicate(timeout=60)
    finally:
        demo.terminate()
    assert demo.returncode == 130, output
    assert "everything is stopped" in output
    assert left_behind("TUTELAGE_DEMO", mark(tmp_path)) == []


def test_an_interrupt_while_it_imports_just_ends_it(tiny_model, tmp_path):
    (tmp_path / "grpc.py").write_text(
        "import pathlib, time\npathlib.Path(__file__ + '.read').touch()\ntime.sleep(60)\n"
    )
    demo = start_demo(tiny_model, tmp_path / "runs", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    try:
        while not (tmp_path / "grpc.py.read").exists():
            assert demo.poll() is None
            time.sleep(0.05)
        os.kill(demo.pid, signal.SIGINT)
        output, _ = demo.communicate(timeout=30)
    finally:
        demo.kill()
    assert (demo.returncode, output) == (-signal.SIGINT, "")


def mark(runs: Path) -> str:
    return next((str(folder) for folder in runs.iterdir()), "not made yet")
