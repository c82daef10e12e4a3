"""Pictures of Ray's dashboard while students train, as docs/ray.md shows them.

    python benchmarks/dashboard_pictures.py [--out build/pictures]

A Ray cluster of one node with its dashboard, the packaged teacher in its server, and a job of three students of 57M,
submitted as a person would. When all have been measured on held-out sequences, Chromium (`chromium` on the PATH) takes
the pictures without a window; then the job is stopped. Also prints what one student's gauges look like to Prometheus.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml  # noqa: E402
from trainer_speed import BUILD, served_teacher  # noqa: E402

from ray_cluster import RAY, cluster, environment, wait_until  # noqa: E402
from tutelage.errors import NotFound  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.cluster.run_control import read_run_status  # noqa: E402

RUN = "word-problems"
OBJECTIVES = {"gkd": "gkd", "forward-kl": "forward_kl", "rev-kd": "reverse_kl"}
MEASURED_STEP = 10


def write_data(path: Path) -> Path:
    """Subtractions in words, with answers."""
    names, things = ("Ann", "Bob", "Mona", "Samir"), ("apples", "stones", "marbles")
    rows = [
        {
            "question": f"{names[i % 4]} has {40 + i} {things[i % 3]} and {names[(i + 1) % 4]} has {3 + i % 30}. "
            f"How many more {things[i % 3]} does {names[i % 4]} have?",
            "answer": f"{40 + i} - {3 + i % 30} = {37 + i - i % 30}. The answer is {37 + i - i % 30}.",
        }
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def submit(dashboard: str, teacher: str, student: Path, folder: Path) -> None:
    """The run as a Ray job."""
    cohort: dict[str, Any] = {
        "run": RUN,
        "output": str(folder / "runs" / RUN),
        "teacher": {"address": teacher},
        "ray": {"address": "auto"},
        "defaults": {
            "init": str(student),
            "data": {"path": str(write_data(folder / "train.jsonl"))},
            "sampling": {"max_new_tokens": 32},
            "batch": {"sequences": 4, "micro_batch_sequences": 4},
            "held_out": {"sequences": 4, "every_steps": 5},
            "steps": 400,
        },
        "students": [{"id": name, "objective": {"name": objective}} for name, objective in OBJECTIVES.items()],
    }
    job = folder / "job"
    job.mkdir()
    (job / "cohort.yaml").write_text(yaml.safe_dump(cohort))
    command = [RAY, "job", "submit", "--address", dashboard, "--submission-id", RUN, "--working-dir", str(job)]
    command += ["--no-wait", "--", "tutelage", "train", "--config", "cohort.yaml"]
    subprocess.run(command, env=environment(folder), check=True, timeout=60)


def all_are_measured(output: Path) -> bool:
    """Whether every student is some steps on."""
    try:
        return all(row.step >= MEASURED_STEP for row in read_run_status(output).students)
    except NotFound:
        return False


def fetch(url: str) -> Any:
    """JSON behind an address."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.load(response)


def take(url: str, path: Path, height: int) -> None:
    """A picture of a page."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size=1400,{height}", "--virtual-time-budget=20000", f"--screenshot={path}", url]
    subprocess.run(command, check=True, timeout=120, stderr=subprocess.DEVNULL)
    print(path, flush=True)


def gauges_of(folder: Path, student: str) -> str:
    """A student's gauges, as every node offers them to Prometheus."""
    # Not Path.rglob, which fails when a folder that it has seen goes away meanwhile.
    name = "**/prom_metrics_service_discovery.json"
    discovery = folder / next(glob.iglob(name, root_dir=folder, recursive=True))
    targets = [target for entry in json.loads(discovery.read_text()) for target in entry["targets"]]
    pages = [urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode() for target in targets]
    lines = [line for page in pages for line in page.splitlines() if line.startswith("ray_tutelage_student")]
    return "\n".join(line for line in lines if f'student="{student}"' in line)


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILD / "pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    teacher, student = prepare(BUILD / "models")
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(prefix="tutelage-") as name:
        folder = Path(name)
        with served_teacher(teacher, folder) as (address, _), cluster(folder) as dashboard:
            submit(dashboard, address, student, folder)
            wait_until(lambda: all_are_measured(folder / "runs" / RUN), 240)
            actors = fetch(f"{dashboard}/logical/actors")["data"]["actors"]
            actor = next(key for key, value in actors.items() if value["name"] == "student-gkd")
            take(f"{dashboard}/#/jobs", out / "dashboard-jobs.png", 640)
            take(f"{dashboard}/#/jobs/{RUN}", out / "dashboard-job.png", 1160)
            take(f"{dashboard}/#/actors", out / "dashboard-actors.png", 860)
            take(f"{dashboard}/#/actors/{actor}", out / "dashboard-actor.png", 1120)
            print(gauges_of(folder, "gkd"))
            subprocess.run([RAY, "job", "stop", "--address", dashboard, RUN], env=environment(folder), timeout=90)


if __name__ == "__main__":
    main()
