"""A run as a Ray Job on a cluster that is there before and after it; the long form starts one."""

from __future__ import annotations

import glob
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from ray_cluster import RAY, cluster, environment, job_status, wait_until
from trainer_cases import metric_rows, write_rows
from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.errors import NotFound
from tutelage.trainer.cluster.run_control import Command, read_run_status, send_command
from tutelage.trainer.model.layer_pruning import prune_layers

TUTELAGE = (sys.executable, "-c", "import sys; from tutelage.cli import main; sys.exit(main())")
GAUGES = ("step", "loss", "forward_kl", "tokens_per_second", "phase_seconds")


def write_cohort(folder: Path, tiny_model: Path, address: str, steps: int) -> Path:
    prune_layers(tiny_model, folder / "init", layers=2)
    rows = write_rows(folder / "rows.jsonl")
    cohort = {
        "run": "job",
        "output": str(folder / "run"),
        "teacher": {"address": address},
        "ray": {"address": "auto"},
        "defaults": {
            "init": str(folder / "init"),
            "data": {"path": str(rows)},
            "batch": {"sequences": 4, "max_tokens": 96},
            "sampling": {"max_new_tokens": 12},
            "held_out": {"sequences": 4, "every_steps": 20},
            "steps": steps,
            "save_every_steps": 5,
        },
        "students": [{"id": "gkd"}, {"id": "rev-kd", "objective": {"name": "reverse_kl", "temperature": 2.0}}],
    }
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump(cohort))
    return path


def submit(dashboard: str, cohort: Path, temporary: Path) -> None:
    """As docs/ray.md says."""
    command = [RAY, "job", "submit", "--address", dashboard, "--submission-id", "distil", "--no-wait", "--"]
    command += [*TUTELAGE, "train", "--config", str(cohort)]
    subprocess.run(command, env=environment(temporary), check=True, stdout=subprocess.DEVNULL, timeout=60)


def steps_done(output: Path) -> int:
    """Of the student that is least far."""
    try:
        return min(row.step for row in read_run_status(output).students)
    except NotFound:
        return 0


def exported(temporary: Path) -> str:
    """All metrics of all nodes, as Prometheus would scrape them."""
    # Not Path.rglob, which fails when a folder that it has seen goes away meanwhile.
    name = "**/prom_metrics_service_discovery.json"
    discovery = temporary / next(glob.iglob(name, root_dir=temporary, recursive=True))
    targets = [target for entry in json.loads(discovery.read_text()) for target in entry["targets"]]
    return "".join(urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode() for target in targets)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_is_submitted_steered_measured_and_finished_as_a_ray_job(tiny_model, tmp_path_factory):
    # Ray's sockets lie below its temporary folder, and their paths must be short.
    folder = tmp_path_factory.mktemp("job")
    with (
        serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as teacher,
        cluster(folder) as dashboard,
    ):
        submit(dashboard, write_cohort(folder, tiny_model, teacher, steps=300), folder)
        wait_until(lambda: steps_done(folder / "run") >= 3, 120)
        send_command(folder / "run", Command("pause", "rev-kd"))
        wait_until(lambda: read_run_status(folder / "run").student("rev-kd").state == "paused", 30)
        wait_until(lambda: all(f"tutelage_student_{name}" in exported(folder) for name in GAUGES), 60)
        assert 'student="gkd"' in exported(folder)
        send_command(folder / "run", Command("resume", "rev-kd"))
        wait_until(lambda: job_status(dashboard, "distil") not in ("PENDING", "RUNNING"), 200)
        assert job_status(dashboard, "distil") == "SUCCEEDED"
    for student in ("gkd", "rev-kd"):
        assert metric_rows(folder / "run" / "students" / student)[-1]["step"] == 300
