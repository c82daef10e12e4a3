"""A study that is submitted runs as one job of a Ray cluster: its students are that cluster's actors."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from ray_cluster import cluster, environment, job_status, wait_until
from study_cases import write_study

STUDY = "import sys; from tutelage.study.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_submitted_study_is_one_job_that_does_what_is_missing(tiny_model, tmp_path_factory):
    # Ray's sockets lie below its temporary folder, and their paths must be short.
    folder = tmp_path_factory.mktemp("study")
    file = write_study(folder, tiny_model)
    with cluster(folder) as dashboard:
        command = [sys.executable, "-c", STUDY, "run", str(file), "--submit", dashboard]
        submitted = subprocess.run(command, env=environment(folder), check=True, capture_output=True, timeout=60)
        found = re.match(r"job (\S+); watch it at", submitted.stdout.decode())
        assert found
        wait_until(lambda: job_status(dashboard, found[1]) not in ("PENDING", "RUNNING"), 240)
        assert job_status(dashboard, found[1]) == "SUCCEEDED"
    assert len(list((folder / "run" / "cells").glob("*.json"))) == 3
    cohort = yaml.safe_load((folder / "run" / "cohorts" / "no-teacher.yaml").read_text())
    assert cohort["ray"]["address"]  # not a Ray of its own
