"""A Ray cluster of one node on this machine, with its dashboard, as tests that submit jobs need it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer_cohorts import free_port

RAY = str(Path(sys.executable).with_name("ray"))


def environment(temporary: Path) -> dict[str, str]:
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    return os.environ | own | {"RAY_TMPDIR": str(temporary), "RAY_USAGE_STATS_ENABLED": "0"}


@contextmanager
def cluster(temporary: Path) -> Iterator[str]:
    """A head node on loopback, which is gone afterwards; gives the dashboard's address."""
    port, dashboard_port = free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4"]
    command += [f"--dashboard-port={dashboard_port}", "--include-dashboard=true", "--object-store-memory=80000000"]
    with (temporary / "ray.log").open("wb") as log:
        head = subprocess.Popen(
            command, env=environment(temporary), stdout=log, stderr=log, start_new_session=True, cwd=temporary
        )
    try:
        address = f"http://127.0.0.1:{dashboard_port}"
        wait_until(lambda: answers(f"{address}/api/version"), 90)
        yield address
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
        finally:
            os.killpg(head.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def job_status(dashboard: str, job: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, …"""
    with urllib.request.urlopen(f"{dashboard}/api/jobs/{job}", timeout=10) as response:
        return str(json.load(response)["status"])
