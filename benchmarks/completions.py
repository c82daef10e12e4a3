"""What do several completions of a prompt save the teacher, and what do they cost the student? Same scored tokens.

    python benchmarks/completions.py [--steps 60] [--completions 4] [--packaged]

A served teacher, an on-policy student (GKD, β = 0.5, `hidden`), prompts of a few solved examples and a question, 16
sequences a step in each: with one completion of each prompt, and with several of a quarter as many. Both trainings see
the same held-out rows, take the same steps and score as many tokens. Printed for each: held-out forward KL before and
after, and the tokens that the teacher was asked for, that its engine computed, and that it had in its prefix cache. By
default teacher and student are the tiny models of the tests; `--packaged` takes the packaged teacher (135M) and its
8-layer student.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from trainer_speed import BUILD, served_teacher  # noqa: E402

from tutelage.files import make_directory_once  # noqa: E402
from tutelage.identity import tokenizer_digests  # noqa: E402
from tutelage.rpc.transport import open_channel  # noqa: E402
from tutelage.rpc.v1 import teacher_pb2 as pb  # noqa: E402
from tutelage.rpc.v1 import teacher_pb2_grpc as pb_grpc  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.config.student import StudentConfig  # noqa: E402
from tutelage.trainer.model.layer_pruning import prune_layers  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402
from tutelage.trainer.training.loop import train  # noqa: E402

EXAMPLES, HELD_OUT, SEQUENCES = 6, 32, 16


def write_prompts(path: Path, count: int) -> Path:
    """Solved sums, other ones in each prompt, and a question; with the answer, for the held-out rows."""

    def solved(i: int) -> str:
        return f"Ann has {i % 97} apples and buys {i * 7 % 90} more. She has {i % 97 + i * 7 % 90}."

    rows = []
    for i in range(count):
        shown = " ".join(solved(i * EXAMPLES + j) for j in range(EXAMPLES))
        question, answer = solved(31 * i + 5).split(" She")
        rows.append({"prompt": f"{shown} {question}", "completion": f"She{answer}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(
    options: argparse.Namespace, student: Path, data: Path, address: str, completions: int, folder: Path
) -> dict[str, Any]:
    """One training against the served teacher: its first and last held-out measures, and the teacher's counters."""
    name = f"completions-{completions}"
    config = StudentConfig.model_validate(
        {
            "id": name,
            "init": student,
            "data": {"path": data},
            "objective": {"name": "gkd", "beta": 0.5, "on_policy_fraction": 1.0, "signal": "hidden"},
            "sampling": {"max_new_tokens": options.new_tokens, "completions": completions},
            "batch": {"sequences": SEQUENCES, "micro_batch_sequences": SEQUENCES, "max_tokens": 384},
            "held_out": {"sequences": HELD_OUT, "every_steps": options.steps},
            "optimizer": {"learning_rate": options.learning_rate, "warmup_steps": 3},
            "steps": options.steps,
            "save_every_steps": options.steps,
            "threads": 2,
        }
    )
    digests = tokenizer_digests(student)
    with TeacherClient(address, student_id=name, wait_seconds=120, tokenizer_digests=digests) as client:
        train(config, folder=folder / name, teacher=client)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    with open_channel(address, None) as channel:
        usage = pb_grpc.TeacherServiceStub(channel).GetTeacherUsage(pb.GetTeacherUsageRequest())
    (counters,) = [each for each in usage.students if each.student_id == name]
    return {
        "completions": completions,
        "scored tokens": int(sum(row.get("train/tokens", 0) for row in rows)),
        "held-out KL before": rows[0]["heldout/forward_kl"],
        "after": rows[-1]["heldout/forward_kl"],
        "tokens asked for": counters.tokens,
        "computed": counters.computed_tokens,
        "in the prefix cache": counters.cached_tokens,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--packaged", action="store_true", help="the packaged models instead of the tiny ones")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.packaged:
            teacher, student = prepare(BUILD / "models")
        else:
            from tiny import write_tiny_model

            teacher = make_directory_once(BUILD / "models" / "tiny", write_tiny_model)
            student = folder / "student"
            prune_layers(teacher, student, layers=2)
        data = write_prompts(folder / "rows.jsonl", HELD_OUT + SEQUENCES * options.steps)
        with served_teacher(teacher, folder) as (address, _):
            table = [
                trained(options, student, data, address, completions, folder)
                for completions in (1, options.completions)
            ]
    print(f"| {' | '.join(table[0])} |\n|{'---|' * len(table[0])}")
    for row in table:
        print(f"| {' | '.join(f'{value:.4f}' if isinstance(value, float) else str(value) for value in row.values())} |")


if __name__ == "__main__":
    main()
