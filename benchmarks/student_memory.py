"""What each further student costs in memory: proportional set size of the actors of two students that train together.

    .venv/bin/python benchmarks/student_memory.py [--steps 4]

Full and LoRA in turn: the packaged 8-layer student of the packaged teacher, bfloat16, GKD from the student's own
sequences with `hidden`, 8 sequences of 64 new tokens in micro-batches of 4. Needs about four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "deploy"))

from prepare_models import prepare  # noqa: E402
from processes import running, wait_for_file  # noqa: E402

STUDENTS = ("ann", "bob")
TUTELAGE = [sys.executable, "-c", "import sys; from tutelage.command import main; sys.exit(main())"]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT / 'proto'}:{ROOT}", "HF_HUB_OFFLINE": "1"}
MIB = 2**20


def cohort(folder: Path, address: str, student: Path, lora: dict[str, int] | None) -> Path:
    """Writes the configuration of two students and their data, and returns its path."""
    rows = [{"prompt": f"Tom has {i} pencils and gives {i % 7} away. Think step by step."} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": folder.name,
        "output": str(folder / "run"),
        "teacher": {"address": address},
        "defaults": {
            "init": str(student),
            "data": {"path": str(folder / "rows.jsonl")},
            "objective": {"name": "gkd", "on_policy_fraction": 1.0},
            "batch": {"sequences": 8, "micro_batch_sequences": 4},
            "sampling": {"max_new_tokens": 64},
            "held_out": {"sequences": 0},
            "lora": lora,
            "steps": 10_000,
        },
        "students": [{"id": name} for name in STUDENTS],
    }
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def steps_done(folder: Path) -> int:
    """Rows of metrics, the one before training left out."""
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) - 1 if path.exists() else -1


def measured(folder: Path, steps: int, train: subprocess.Popen[bytes]) -> dict[str, tuple[float, float]]:
    """Largest proportional and unique set size of each student's process, MiB, over so many steps of both."""
    folders = {name: folder / "run/students" / name for name in STUDENTS}
    largest = dict.fromkeys(STUDENTS, (0.0, 0.0))
    while min(map(steps_done, folders.values())) < steps:
        if train.poll() is not None:
            raise SystemExit(f"training ended with {train.returncode}; see {folder / 'log'}")
        for name, path in folders.items():
            if steps_done(path) >= 1:
                process = int(re.findall(r"process (\d+)", (path / "lock").read_text())[0])
                memory = psutil.Process(process).memory_full_info()
                largest[name] = max(largest[name], (memory.pss / MIB, memory.uss / MIB))
        time.sleep(0.2)
    return largest


def main() -> None:
    """Prints both students' memory, full and LoRA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="steps of both students that are watched")
    options = parser.parse_args()
    teacher, student = prepare(Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build")) / "models")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        serve = [*TUTELAGE, "teacher", "serve", "--model", str(teacher), "--address", "127.0.0.1:0"]
        serve += ["--address-file", str(base / "address"), "--max-sequence-tokens", "512"]
        with running(serve, log=base / "teacher.log", environment=ENVIRONMENT) as process:
            address = wait_for_file(base / "address", process, log=base / "teacher.log", seconds=240)
            for kind, lora in (("full", None), ("LoRA rank 8", {"rank": 8})):
                folder = base / kind.split()[0].lower()
                folder.mkdir()
                command = [*TUTELAGE, "train", "--config", str(cohort(folder, address, student, lora))]
                with running(command, log=folder / "log", environment=ENVIRONMENT) as train:
                    largest = measured(folder, options.steps, train)
                    os.killpg(train.pid, signal.SIGINT)
                    train.wait(60)
                for name, (pss, uss) in largest.items():
                    print(
                        f"{kind}, student {name}: PSS {pss:.0f} MiB, of which its own alone {uss:.0f} MiB", flush=True
                    )


if __name__ == "__main__":
    main()
