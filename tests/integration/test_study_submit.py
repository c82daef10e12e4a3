"""A study that is submitted runs as one job of a Ray cluster: its students are that cluster's actors."""

from __future__ import annotations

import pytest
import yaml

from ray_cluster import cluster, job_status, submit, wait_until
from study_cases import write_study


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_submitted_study_is_one_job_that_does_what_is_missing(tiny_model, tmp_path):
    file = write_study(tmp_path, tiny_model)
    with cluster(tmp_path) as head:
        job = submit(head, tmp_path, "study", "run", file.name)
        wait_until(lambda: job_status(head, job) not in ("PENDING", "RUNNING"), 240)
        assert job_status(head, job) == "SUCCEEDED"
    assert len(list((tmp_path / "run" / "cells").glob("*.json"))) == 3
    cohort = yaml.safe_load((tmp_path / "run" / "cohorts" / "no-teacher.yaml").read_text())
    assert cohort["ray"]["address"] == head.service.address  # not a Ray of its own
