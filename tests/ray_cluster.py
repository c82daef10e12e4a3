"""A Ray cluster of one node on this machine, as `tutelage up` starts it, for tests that submit jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tutelage.runtime import ray_jobs
from tutelage.up.config import RayService
from tutelage.up.services import RayHead

_RUN = "import sys; from tutelage.cli import main; sys.exit(main())"


@contextmanager
def cluster(folder: Path) -> Iterator[RayHead]:
    """A head node on loopback, which asks for a token, takes jobs, and is gone afterwards."""
    (folder / "logs").mkdir()
    head = RayHead(RayService(cpus=4, object_store_bytes=80 * 2**20), folder, ready_seconds=120)
    try:
        head.service.address  # noqa: B018  (is waited for)
        yield head
    finally:
        head.close()


def submit(head: RayHead, folder: Path, *command: str) -> str:
    """Hands `tutelage …`, typed in a folder that is none of Ray's, to the cluster as one job; gives its id."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    given = [sys.executable, "-c", _RUN, *command, "--submit", head.url, "--submit-token", str(head.token_file)]
    done = subprocess.run(given, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=100)
    found = re.match(r"job (\S+); watch it at", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1]


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def job_status(head: RayHead, job: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, …"""
    return str(ray_jobs.ask(head.url, f"/api/jobs/{job}", head.token_file)["status"])
