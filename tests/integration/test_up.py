"""`tutelage up` with real services: Ray, evaluator, Prometheus; a cohort as a job; `down`, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import yaml

from ray_cluster import wait_until
from trainer_cases import write_rows
from tutelage.errors import NotAuthenticated
from tutelage.runtime import ray_jobs
from tutelage.runtime.owner import owner
from tutelage.runtime.processes import left_behind

ROOT = Path(__file__).resolve().parents[2]
MARK = "TUTELAGE_TEST_UP"
# As `tutelage.cli.main`, which knows these commands when this tree is what is installed.
COMMAND = """
import sys
from tutelage import cli
from tutelage.up import cli as own
run = {"up": own.up, "down": own.down}.get(sys.argv[1])
if run is None:
    sys.exit(cli.main(sys.argv[1:]))
with cli._terminated_as_an_exception():
    sys.exit(cli._ended(f"tutelage {sys.argv[1]}", lambda: run(sys.argv[2:])))
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, *arguments]


def environment(mark: Path) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT / "proto"), "OMP_NUM_THREADS": "1", MARK: str(mark)}
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | own


def start_up(folder: Path, **changes: Any) -> subprocess.Popen[str]:
    values = {"output": str(folder / "run"), "ray": {"cpus": 2}, "evaluator": {"serve": {"engine": "transformers"}}}
    (folder / "up.yaml").write_text(yaml.safe_dump(values | changes))
    return subprocess.Popen(
        command("up", "--config", str(folder / "up.yaml")),
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(autouse=True)
def temporary(monkeypatch) -> Iterator[Path]:
    """Of these services alone; with a short name, because sockets lie below it, whose names may have 107 bytes."""
    with TemporaryDirectory(prefix="up-") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def services(folder: Path) -> dict[str, Any]:
    path = folder / "run" / "services.json"
    return {row["name"]: row for row in json.loads(path.read_text())} if path.exists() else {}


def beyond_loopback(folder: Path) -> list[str]:
    """Addresses that processes of this `up` listen on and other machines reach."""
    found = []
    for process in left_behind(MARK, str(folder)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in process.net_connections("inet"):
                if each.status == psutil.CONN_LISTEN and each.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
                    found.append(f"{process.name()} {each.laddr.ip}:{each.laddr.port}")
    return found


def write_cohort(folder: Path, tiny_model: Path) -> Path:
    cohort = {
        "run": "submitted",
        "output": str(folder / "cohort"),
        "teacher": None,
        "defaults": {
            "init": str(tiny_model),
            "data": {"path": str(write_rows(folder / "rows.jsonl"))},
            "batch": {"sequences": 4, "max_tokens": 96},
            "steps": 4,
            "save_every_steps": 2,
        },
        "students": [{"id": "sft", "objective": {"name": "sft"}}],
    }
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump(cohort))
    return path


@pytest.mark.timeout(200)
def test_everything_of_one_machine_comes_up_trains_what_is_submitted_and_goes(tiny_model, tmp_path, temporary):
    process = start_up(tmp_path)
    try:
        wait_until(lambda: services(tmp_path) or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()
        ray, token = services(tmp_path)["ray"]["url"], tmp_path / "run" / "ray.token"
        cohort = write_cohort(tmp_path, tiny_model)
        submitted = command("train", "--config", str(cohort), "--submit", ray, "--submit-token", str(token))
        printed = subprocess.run(submitted, env=environment(tmp_path), capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr
        job = printed.stdout.split()[1].rstrip(";")
        with pytest.raises(NotAuthenticated):
            ray_jobs.ask(ray, f"/api/jobs/{job}")
        status = lambda: ray_jobs.ask(ray, f"/api/jobs/{job}", token)["status"]  # noqa: E731
        wait_until(lambda: status() not in ("PENDING", "RUNNING"), 100)
        assert status() == "SUCCEEDED"
        assert (tmp_path / "cohort" / "students" / "sft" / "checkpoints" / "step-00000004" / "MANIFEST.json").exists()
        assert beyond_loopback(tmp_path) == []
        if shutil.which("prometheus"):
            query = urllib.parse.quote("count(up == 1) by (job)")
            url = f"{services(tmp_path)['prometheus']['url']}/api/v1/query?query={query}"
            jobs = {each["metric"]["job"] for each in json.load(urllib.request.urlopen(url))["data"]["result"]}
            assert jobs >= {"tutelage-evaluator", "ray"}
        down = command("down", "--output", str(tmp_path / "run"))
        done = subprocess.run(down, env=environment(tmp_path), capture_output=True, text=True, timeout=60)
        assert "has ended" in done.stdout
        output, _ = process.communicate(timeout=20)
        assert "every service has ended" in output
    finally:
        process.kill()
    assert left_behind(MARK, str(tmp_path)) == []
    assert list(temporary.glob("tutelage-ray-*")) == []


@pytest.mark.timeout(120)
def test_a_killed_up_takes_its_services_along(tmp_path):
    process = start_up(tmp_path, prometheus=False, ray=None)
    try:
        wait_until(lambda: services(tmp_path) or process.poll() is not None, 60)
        assert process.poll() is None, process.communicate()
    finally:
        process.kill()
    wait_until(lambda: left_behind(MARK, str(tmp_path)) == [], 20)
    assert owner(tmp_path / "run", "up") is None


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_ctrl_c_at_ten_random_moments_of_the_demonstration_leaves_nothing(tiny_model, tmp_path, temporary):
    draw = random.Random()  # other moments every time
    for number in range(10):
        runs = tmp_path / str(number)
        demo = subprocess.Popen(
            [sys.executable, str(ROOT / "deploy" / "demo.py"), "--teacher", str(tiny_model), "--runs", str(runs)],
            env=environment(runs),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        seconds = draw.uniform(1.0, 110.0)
        end = time.monotonic() + seconds
        while time.monotonic() < end and demo.poll() is None:
            time.sleep(0.1)
        if demo.poll() is None:
            demo.send_signal(signal.SIGINT)
        output, _ = demo.communicate(timeout=90)
        said = f"after {seconds:.1f} s:\n{output}"
        assert demo.returncode in (0, 130, -signal.SIGINT), said  # the last while it still imports
        assert "Traceback" not in output, said
        assert "was left behind" not in output, said
        assert left_behind(MARK, str(runs)) == [], said
        assert list(temporary.glob("tutelage-ray-*")) == [], said
        assert all(owner(run, "up") is None for run in runs.glob("demo-*")), said
