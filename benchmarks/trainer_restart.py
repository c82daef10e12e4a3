"""The seconds until a student whose process was killed trains again, and what its neighbours notice of it.

    python benchmarks/trainer_restart.py [--students 3 1] [--kills 3]

Students of 57M train on Ray beside their teacher, all in processes of their own. One of them is killed with SIGKILL,
some steps after a checkpoint, several times. Seconds since the kill, by what the new process leaves on disk:

- answers: the run's status, which the supervisor writes twice a second, names the new process
- imported: modules are there, the teacher has answered, and the process holds the student's lock
- resumed: weights, optimizer and data are there (`student.yaml` is written)
- back: its first step begins, the teacher's unembedding fetched
- a step: that step is done

Once with two neighbours and once alone. Exits with 1 if a median of *back* is above 10 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml  # noqa: E402
from trainer_many import stepping, wait_for, write_cohort  # noqa: E402
from trainer_speed import BUILD, TUTELAGE, served_teacher, write_prompts  # noqa: E402

from tutelage.runtime.processes import running  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.cluster.run_control import read_run_status  # noqa: E402

PROMISED_SECONDS = 10.0
SAVE_EVERY_STEPS, STEPS_LOST = 5, 3
MARKS = ("answers", "imported", "resumed", "back", "a step")


@dataclass(frozen=True)
class Return:
    """What one kill led to."""

    seconds: dict[str, float]
    """From the kill until each of `MARKS`."""
    neighbours: dict[str, list[float]]
    """Seconds of the neighbours' steps before, during and after."""


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a student's metrics, without those at step 0."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if row["step"] > 0]


def step_seconds(row: dict[str, Any]) -> float:
    """Wall clock of the step that ended with this row."""
    return float(sum(value for name, value in row.items() if name.startswith("seconds/")))


def process_of(folder: Path) -> int:
    """Who trains the student, as the run's status says; 0 while nobody answers."""
    status = read_run_status(folder.parents[1])
    return next(row.process_id or 0 for row in status.students if row.student == folder.name)


def to_be_killed(folder: Path) -> bool:
    """Whether a student is so many steps after a checkpoint."""
    step = rows_of(folder)[-1]["step"]
    return bool(step > SAVE_EVERY_STEPS and step % SAVE_EVERY_STEPS == STEPS_LOST)


def kill_and_watch(victim: Path, neighbours: Sequence[Path]) -> Return:
    """Kills a student's process and waits until its successor has done a step."""
    before = {folder: process_of(folder) for folder in neighbours}
    killed, killed_at = process_of(victim), time.time()
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: process_of(victim) not in (0, killed), pause_seconds=0.02)
    answers_at = time.time()
    wait_for(lambda: rows_of(victim)[-1]["time_seconds"] > killed_at, pause_seconds=0.02)
    first = next(row for row in rows_of(victim) if row["time_seconds"] > killed_at)
    moments = {
        "answers": answers_at,
        "imported": (victim / "lock").stat().st_mtime,
        "resumed": (victim / "student.yaml").stat().st_mtime,
        "back": first["time_seconds"] - step_seconds(first),
        "a step": first["time_seconds"],
    }
    time.sleep(first["time_seconds"] - killed_at)  # As long again, for what the neighbours do afterwards.
    for folder, process_id in before.items():
        if process_of(folder) != process_id:
            raise SystemExit(f"{folder.name} has another process: it was disturbed")
    return Return(
        {mark: moments[mark] - killed_at for mark in MARKS},
        steps_around(neighbours, killed_at, moments["a step"]),
    )


def steps_around(neighbours: Sequence[Path], killed_at: float, back_at: float) -> dict[str, list[float]]:
    """Seconds of the neighbours' steps by when they ended: before the kill, until the killed one is back, later."""
    times: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    for row in (row for folder in neighbours for row in rows_of(folder)):
        when = "before" if row["time_seconds"] < killed_at else "during" if row["time_seconds"] < back_at else "after"
        if abs(row["time_seconds"] - killed_at) < 2 * (back_at - killed_at):
            times[when].append(step_seconds(row))
    return times


def configure(cohort: Path, students: int, kills: int) -> None:
    """All students at once, with checkpoints, and as many restarts as there will be kills."""
    values = yaml.safe_load(cohort.read_text()) | {"concurrency": students, "ray": {"max_restarts": kills}}
    values["defaults"]["save_every_steps"] = SAVE_EVERY_STEPS
    cohort.write_text(yaml.safe_dump(values))


def kill_in_turn(cohort: Path, students: int, options: argparse.Namespace) -> list[Return]:
    """All kills of one run; the victim is the first student, some steps after a checkpoint."""
    configure(cohort, students, options.kills)
    folder = cohort.parent
    environment = {"PYTHONPATH": str(ROOT / "proto"), "OMP_NUM_THREADS": "1"}
    returns: list[Return] = []
    with running([*TUTELAGE, "train", "--config", str(cohort)], log=folder / "train.log", environment=environment):
        stepping(folder / "run", students)
        victim, *neighbours = (folder / f"run/students/student-{number}" for number in range(students))
        for _ in range(options.kills):
            wait_for(lambda: to_be_killed(victim), pause_seconds=0.02)
            returns.append(kill_and_watch(victim, neighbours))
            seconds = ", ".join(f"{mark} {value:.1f}" for mark, value in returns[-1].seconds.items())
            print(f"killed: {seconds}", flush=True)
    return returns


def report(returns: Sequence[Return]) -> float:
    """Prints the medians, and returns that of *back*."""
    medians = {mark: statistics.median(one.seconds[mark] for one in returns) for mark in MARKS}
    print("\n| " + " | ".join(MARKS) + " |\n|" + "---|" * len(MARKS))
    print("| " + " | ".join(f"{value:.1f}" for value in medians.values()) + " |")
    for when in ("before", "during", "after"):
        steps = [seconds for one in returns for seconds in one.neighbours[when]]
        if steps:
            print(f"neighbours' steps {when}: median {statistics.median(steps):.2f} s, longest {max(steps):.2f} s")
    print(f"\nback after {medians['back']:.1f} s (promised: at most {PROMISED_SECONDS:.0f})")
    return medians["back"]


def main() -> None:
    """Prints each return and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, nargs="+", default=[3, 1], help="of each run")
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    teacher, student = prepare(BUILD / "models")
    with tempfile.TemporaryDirectory() as name:
        folder, medians = Path(name), []
        prompts = write_prompts(folder / "prompts.jsonl", 64)
        with served_teacher(teacher, folder) as (address, _):
            for students in options.students:
                run = folder / f"students-{students}"
                run.mkdir()
                cohort = write_cohort(run / "cohort.yaml", address, student, prompts, students)
                print(f"\nstudents: {students}", flush=True)
                medians.append(report(kill_in_turn(cohort, students, options)))
    sys.exit(max(medians) > PROMISED_SECONDS)


if __name__ == "__main__":
    main()
