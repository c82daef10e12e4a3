"""A teacher's servers found by a name that a name server resolves, as a headless service's are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import named_teachers

UNSHARE = ["unshare", "--map-root-user", "--mount", "--net"]


@pytest.mark.long
def test_servers_come_and_go_behind_a_name(tmp_path):
    if subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody have a network of their own (unshare)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*UNSHARE, sys.executable, str(Path(named_teachers.__file__)), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    assert seen["first"] == ["127.0.0.2", "127.0.0.3"]
    assert seen["then"] == ["127.0.0.3", "127.0.0.4"]
    before, after = seen["answered"], seen["answered then"]
    assert min(before[:2]) > 5, "both answer"
    assert before[2] == 0
    assert after[0] == before[0]
    assert min(after[1] - before[1], after[2]) > 5, "who came answers, too"
