"""What the signal store saves: a grid of objectives, temperatures and noises with it and without it.

    python benchmarks/study_store.py [--model DIR] [--student DIR] [--data FILE] [--steps 30]

By default the packaged teacher and its 8-layer student on generated arithmetic problems.

Runs the same study twice through every real service; prints the wall-clock of the teacher's wave, the sequences that
its students asked for and the engine passes that they cost, by the teacher's own counters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]

from tutelage.evaluator.tasks.arithmetic_generator import generate  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402

STUDY = "import sys; from tutelage.study.cli import main; sys.exit(main(sys.argv[1:]))"


def study(options: argparse.Namespace, folder: Path, *, store: bool) -> dict[str, Any]:
    """Two objectives at three temperatures, and one at two noises: eight cells over the same sequences."""
    models = {
        name: {"path": str(Path(path).resolve()), "parameters": 1, "hidden_size": 1}
        for name, path in (("teacher", options.model), ("student", options.student))
    }
    return {
        "name": "store" if store else "no-store",
        "output": str(folder),
        "models": models,
        "teachers": {"teacher": {"model": "teacher", "tuned": False, "serve": {"max_model_len": 256}}},
        "students": ["student"],
        "data": str(options.data.resolve()),
        "seeds": [0],
        "settings": {
            "data": {"template": options.template},
            "steps": options.steps,
            "save_every_steps": options.steps,
            "batch": {"sequences": 8, "micro_batch_sequences": 8, "max_tokens": 128},
            "held_out": {"sequences": 0, "every_steps": options.steps},
        },
        "methods": {name: {"objective": {"name": name}} for name in ("forward_kl", "reverse_kl")},
        "grid": [
            {"methods": ["forward_kl", "reverse_kl"], "temperatures": [1, 2, 5]},
            {"methods": ["forward_kl"], "noises": [1, 5]},
        ],
        "evaluation": {"tasks": [{"task": "arithmetic", "limit": 1}], "serve": {"engine": "transformers"}},
        "concurrency": 2,
        "store": store,
    }


def write_problems(path: Path) -> Path:
    """Word problems with worked answers."""
    path.write_text(json.dumps(generate("train", 400, 0)))
    return path


def run(options: argparse.Namespace, folder: Path, *, store: bool) -> dict[str, float]:
    """Runs the study and reads what its trainers and its teacher noted."""
    folder.mkdir()
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study(options, folder, store=store)))
    subprocess.run([sys.executable, "-c", STUDY, "run", str(file)], check=True, cwd=ROOT)
    rows = [
        json.loads(line) for path in folder.glob("students/*/metrics.jsonl") for line in path.read_text().splitlines()
    ]
    times = [row["time_seconds"] for row in rows]
    (usage,) = [json.loads(path.read_text()) for path in folder.glob("usage/*.json")]
    return {
        "seconds": max(times) - min(times),
        "scoring_seconds": sum(row.get("seconds/scoring", 0.0) for row in rows),
        "sequences": sum(int(one["sequences"]) for one in usage["students"]),
        "engine_passes": int(usage["engine_passes"]),
    }


def main() -> None:
    """Prints both runs."""
    teacher, student = prepare(Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build")) / "models")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=teacher)
    parser.add_argument("--student", type=Path, default=student)
    parser.add_argument("--data", type=Path, help="rows to learn from; by default 400 generated problems")
    parser.add_argument("--template", default="chat")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options.data = options.data or write_problems(Path(scratch) / "problems.json")
        for name, store in (("without the store", False), ("with the store", True)):
            found = run(options, Path(scratch) / name.replace(" ", "-"), store=store)
            print(
                f"{name:<18} {found['seconds']:7.1f} s from the first to the last step, "
                f"{found['scoring_seconds']:7.1f} s of them waiting for scores (all students), "
                f"{found['sequences']:6.0f} sequences asked, {found['engine_passes']:6.0f} engine passes"
            )


if __name__ == "__main__":
    main()
