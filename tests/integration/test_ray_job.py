"""A run as a Ray Job on a cluster that is there before and after it; the long form starts one."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
import yaml

from ray_cluster import cluster, job_status, submit, wait_until
from trainer_cases import metric_rows, write_rows
from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.errors import NotFound
from tutelage.trainer.cluster.run_control import Command, read_run_status, send_command
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.up.services import RayHead

GAUGES = ("step", "loss", "forward_kl", "tokens_per_second", "phase_seconds")


def write_cohort(folder: Path, tiny_model: Path, address: str, steps: int) -> None:
    """Its paths are those of the folder."""
    prune_layers(tiny_model, folder / "init", layers=2)
    write_rows(folder / "rows.jsonl")
    cohort = {
        "run": "job",
        "output": "run",
        "teacher": {"address": address},
        "defaults": {
            "init": "init",
            "data": {"path": "rows.jsonl"},
            "batch": {"sequences": 4, "max_tokens": 96},
            "sampling": {"max_new_tokens": 12},
            "held_out": {"sequences": 4, "every_steps": 20},
            "steps": steps,
            "save_every_steps": 5,
        },
        "students": [{"id": "gkd"}, {"id": "rev-kd", "objective": {"name": "reverse_kl", "temperature": 2.0}}],
    }
    (folder / "cohort.yaml").write_text(yaml.safe_dump(cohort))


def steps_done(output: Path) -> int:
    """Of the student that is least far."""
    try:
        return min(row.step for row in read_run_status(output).students)
    except NotFound:
        return 0


def exported(head: RayHead) -> str:
    """All metrics of all nodes, as Prometheus would scrape them."""
    targets = [target for entry in json.loads(head.scraped.read_text()) for target in entry["targets"]]
    return "".join(urllib.request.urlopen(f"http://{target}/metrics", timeout=5).read().decode() for target in targets)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_is_submitted_steered_measured_and_finished_as_a_ray_job(tiny_model, tmp_path):
    run = tmp_path / "run"
    with serving(FaultyServicer(InProcessTeacher(tiny_model), tiny_model)) as teacher, cluster(tmp_path) as head:
        write_cohort(tmp_path, tiny_model, teacher, steps=300)
        job = submit(head, tmp_path, "train", "--config", "cohort.yaml")
        wait_until(lambda: steps_done(run) >= 3, 120)
        send_command(run, Command("pause", "rev-kd"))
        wait_until(lambda: read_run_status(run).student("rev-kd").state == "paused", 30)
        wait_until(lambda: all(f"tutelage_student_{name}" in exported(head) for name in GAUGES), 60)
        assert 'student="gkd"' in exported(head)
        send_command(run, Command("resume", "rev-kd"))
        wait_until(lambda: job_status(head, job) not in ("PENDING", "RUNNING"), 200)
        assert job_status(head, job) == "SUCCEEDED"
    for student in ("gkd", "rev-kd"):
        assert metric_rows(run / "students" / student)[-1]["step"] == 300
