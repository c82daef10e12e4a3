"""What does a further student of one teacher cost? Its own memory, and nothing of the teacher's throughput.

    python benchmarks/trainer_many.py [--students 5] [--seconds 10] [--rounds 6]

Memory: students of 57M train on Ray, one at first, then two, and so on, by `tutelage students scale`; for each number
the proportional set size (PSS, in which shared pages count once) of every student, of Ray's own processes, and of the
teacher. Throughput: the teacher's tokens a second for one student that asks
without pause, and for several, in turn; the ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402
from trainer_speed import BUILD, TUTELAGE, served_teacher, write_prompts  # noqa: E402

from tutelage.errors import NotFound  # noqa: E402
from tutelage.identity import tokenizer_digests  # noqa: E402
from tutelage.runtime.processes import running  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.cluster.run_control import Command, read_run_status, send_command  # noqa: E402
from tutelage.trainer.data.sequences import TokenSequence  # noqa: E402
from tutelage.trainer.teacher.base import SignalSpec  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402

SEQUENCE_TOKENS, SEQUENCES = 128, 8
STEPPED = 2


def pss_mib(processes: list[psutil.Process]) -> float:
    """Proportional set size of some processes together, MiB."""
    return sum(process.memory_full_info().pss for process in processes) / 2**20


def write_cohort(path: Path, address: str, student: Path, prompts: Path, students: int) -> Path:
    """Students that differ in their seed only, one at a time at first."""
    cohort = {
        "run": "many",
        "output": str(path.parent / "run"),
        "teacher": {"address": address},
        "concurrency": 1,
        "defaults": {
            "init": str(student),
            "data": {"path": str(prompts)},
            "objective": {"name": "gkd", "on_policy_fraction": 1.0},
            "sampling": {"max_new_tokens": 32},
            "batch": {"sequences": 4, "micro_batch_sequences": 4},
            "held_out": {"sequences": 0},
            "steps": 100_000,
            "save_every_steps": 100_000,
        },
        "students": [{"id": f"student-{number}", "seed": number} for number in range(students)],
    }
    path.write_text(yaml.safe_dump(cohort))
    return path


def wait_for(condition: Callable[[], bool], seconds: float = 240, *, pause_seconds: float = 0.5) -> None:
    """Returns when it holds; asks every `pause_seconds`.

    Raises:
        SystemExit: it does not in time.

    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the students do not step; see the log above")
        time.sleep(pause_seconds)


def stepping(output: Path, students: int) -> list[int]:
    """Process ids of the students that have taken some steps, once there are so many."""

    def ready() -> list[int]:
        try:
            rows = read_run_status(output).students
        except NotFound:
            return []
        return [row.process_id for row in rows if row.process_id and row.step >= STEPPED]

    wait_for(lambda: len(ready()) == students)
    return ready()


def memory(folder: Path, address: str, teacher_pid: int, student: Path, prompts: Path, students: int) -> None:
    """A row for each number of students."""
    cohort = write_cohort(folder / "cohort.yaml", address, student, prompts, students)
    environment = {"PYTHONPATH": str(ROOT / "proto"), "OMP_NUM_THREADS": "1"}
    print("\n| students | MiB of each (PSS) | Ray and the supervisor, MiB | teacher, MiB |\n|---|---|---|---|")
    with running(
        [*TUTELAGE, "train", "--config", str(cohort)], log=folder / "train.log", environment=environment
    ) as run:
        for count in range(1, students + 1):
            if count > 1:
                send_command(folder / "run", Command("scale", concurrency=count))
            own = stepping(folder / "run", count)
            each = ", ".join(f"{pss_mib([psutil.Process(pid)]):.0f}" for pid in own)
            family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            others = [process for process in family if process.pid not in own]
            served = psutil.Process(teacher_pid)
            teacher = pss_mib([served, *served.children(recursive=True)])
            print(f"| {count} | {each} | {pss_mib(others):.0f} | {teacher:.0f} |", flush=True)


def throughput(address: str, student: Path, students: int, seconds: float, rounds: int) -> None:
    """The teacher's tokens a second for one student, and for several at once."""
    rates: dict[int, list[float]] = {1: [], students: []}
    for number in range(rounds):
        for count in list(rates)[:: (-1) ** number]:
            rates[count].append(tokens_per_second(address, student, count, seconds))
    print("\n| students that ask | tokens a second, all together (median, range) |\n|---|---|")
    for count, of_rounds in rates.items():
        print(f"| {count} | {statistics.median(of_rounds):.0f} ({min(of_rounds):.0f} to {max(of_rounds):.0f}) |")
    ratios = sorted(several / one for one, several in zip(*rates.values(), strict=True))
    print(f"\n{students} students / one: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def tokens_per_second(address: str, student: Path, students: int, seconds: float) -> float:
    """Tokens scored in `seconds` by students that each always have a batch in flight."""
    digests, vocabulary = tokenizer_digests(student), json.loads((student / "config.json").read_text())["vocab_size"]
    scored = [0] * students
    end = time.monotonic() + seconds

    def ask_without_pause(number: int) -> None:
        randomness = np.random.default_rng(number)
        with TeacherClient(address, student_id=f"asks-{number}", wait_seconds=60, tokenizer_digests=digests) as client:
            while time.monotonic() < end:
                ids = randomness.integers(vocabulary, size=(SEQUENCES, SEQUENCE_TOKENS), dtype=np.int32)
                requests = [TokenSequence(row, SEQUENCE_TOKENS // 2, SEQUENCE_TOKENS - 1) for row in ids]
                client.score(requests, SignalSpec("hidden"))
                scored[number] += ids.size

    threads = [threading.Thread(target=ask_without_pause, args=(number,)) for number in range(students)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(scored) / (time.monotonic() - started)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each throughput")
    parser.add_argument("--rounds", type=int, default=6, help="of both throughputs")
    options = parser.parse_args()
    teacher, student = prepare(BUILD / "models")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = write_prompts(folder / "prompts.jsonl", 64)
        with served_teacher(teacher, folder) as (address, pid):
            throughput(address, student, options.students, options.seconds, options.rounds)
            memory(folder, address, pid, student, prompts, options.students)


if __name__ == "__main__":
    main()
