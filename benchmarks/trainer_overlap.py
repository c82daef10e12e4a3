"""What does it bring that the teacher scores while the student steps? Seconds a step with and without.

    python benchmarks/trainer_overlap.py [--rounds 6] [--student-threads 1] [--teacher-threads 1]

The packaged teacher, served, and its 8-layer student, as in `trainer_speed.py`, each on cores of its own. Four students
in this process take turns of four steps; the first of a turn does not count, since its batch was scored in the turn
before.

    data, in turn         forward KL on the data's sequences, no batch begun before its step
    data, meanwhile       the same as it is: the next batch is scored while the student steps; the same numbers
    own, in turn          GKD on the student's own sequences, strictly on-policy
    own, one step older   the same with `max_staleness: 1`

The seconds for which a step stood still for the teacher are `scoring`. A ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from trainer_speed import BATCH, BUILD, NEW_TOKENS, Ours, prepare, served_teacher, write_prompts

from tutelage.trainer.training.batch_builder import BatchBuilder

STEPS_A_TURN = 4
MEASURED = ("seconds", "seconds/scoring", "train/tokens")
DATA = {"objective": {"name": "forward_kl", "signal": "hidden"}}
STALE = {"sampling": {"max_new_tokens": NEW_TOKENS, "max_staleness": 1}}
SIDES: dict[str, dict[str, Any]] = {
    "data, in turn": DATA,
    "data, meanwhile": DATA,
    "own, in turn": {},
    "own, one step older": STALE,
}
PAIRS = (("data, in turn", "data, meanwhile"), ("own, in turn", "own, one step older"))


@contextmanager
def in_turn() -> Iterator[None]:
    """No batch is begun before its step."""
    ahead = BatchBuilder.prefetch_steps
    BatchBuilder.prefetch_steps = property(lambda _batches: 0)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        BatchBuilder.prefetch_steps = ahead  # type: ignore[method-assign]


def write_rows(path: Path, count: int) -> Path:
    """The prompts of `trainer_speed`, each with a completion of about as many tokens as the student writes."""
    rows = [json.loads(line) for line in write_prompts(path, count).read_text().splitlines()]
    for number, row in enumerate(rows):
        numbers = ", ".join(str(number + 3 * i) for i in range(16))
        row["completion"] = f"First I count: {numbers}. Then I take the half."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def take_turn(side: Ours, name: str) -> dict[str, float]:
    """Means of a turn's steps but the first."""
    with in_turn() if name == "data, in turn" else nullcontext():
        steps = [side.step() for _ in range(STEPS_A_TURN)][1:]
    return {key: statistics.fmean(step[key] for step in steps) for key in MEASURED}


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Turns, then the table."""
    teacher, student = prepare(BUILD / "models")
    rows = write_rows(folder / "rows.jsonl", BATCH * 64)
    cores = sorted(os.sched_getaffinity(0))
    split = options.teacher_threads
    with served_teacher(teacher, folder, "--score-cores", ",".join(map(str, cores[:split]))) as (address, _):
        os.sched_setaffinity(0, cores[split:])
        sides = {name: Ours(options, student, rows, address, **changes) for name, changes in SIDES.items()}
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(-1, options.rounds):  # The first warms up.
            for name, side in sides.items():
                turn = take_turn(side, name)
                print(f"{name}: {turn['seconds']:.2f} s, of them scoring {turn['seconds/scoring']:.2f}", flush=True)
                if number >= 0:
                    turns[name].append(turn)
    report(turns)


def report(turns: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and what each pair's second takes of its first."""
    print("\n| | seconds a step (median) | of them standing still for the teacher | tokens |\n|---|---|---|---|")
    for name, each in turns.items():
        medians = {key: statistics.median(turn[key] for turn in each) for key in MEASURED}
        print(f"| {name} | " + " | ".join(f"{medians[key]:.2f}" for key in MEASURED) + " |")
    for one, other in PAIRS:
        ratios = [after["seconds"] / before["seconds"] for before, after in zip(turns[one], turns[other], strict=True)]
        print(f"\n{other} / {one}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    """Prints seconds a step of each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--student-threads", type=int, default=1)
    parser.add_argument("--teacher-threads", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
