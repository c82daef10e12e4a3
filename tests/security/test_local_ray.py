"""The Ray that `tutelage train` starts for itself is reached from this machine only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_LISTENING = """
import json, sys
import psutil
import ray
from tutelage.trainer.cluster.supervisor import local_or_connected_ray
from tutelage.trainer.config.run import CohortConfig

config = CohortConfig.model_validate(json.loads(sys.argv[1]))
with local_or_connected_ray(config):
    mine = psutil.Process()
    sockets = [
        connection.laddr.ip
        for process in (mine, *mine.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
print(json.dumps(sockets))
"""


def test_ray_of_this_machine_listens_on_loopback_only(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2", "completion": "4"}\n')
    student = {"id": "ann", "init": str(tmp_path), "data": {"path": str(tmp_path / "rows.jsonl")}, "steps": 1}
    config = {
        "run": "alone",
        "output": str(tmp_path),
        "teacher": None,
        "students": [student | {"objective": {"name": "sft"}}],
        "ray": {"cpus": 1, "object_store_bytes": 80 * 2**20, "dashboard": False},
    }
    # Of its own, since one Ray a process is all that there can be.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", _LISTENING, json.dumps(config)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    addresses = json.loads(ended.stdout.splitlines()[-1])
    assert addresses, "Ray listens somewhere"
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
