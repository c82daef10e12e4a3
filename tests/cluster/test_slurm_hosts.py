"""The batch script of Slurm on three hosts with a real Ray, teacher and cohort; of Slurm there are stand-ins."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from hosts import Host, hosts, why_not
from ray_cluster import wait_until
from trainer_cases import metric_rows, write_rows
from tutelage.certificates import Authority
from tutelage.trainer.model.layer_pruning import prune_layers

ROOT = Path(__file__).resolve().parents[2]
STEPS = 400
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do case $1 in --nodelist=*) node=${1#*=};; esac; shift; done
case $node in
%s
esac
"""
# A node's name is its address.
SCONTROL = '#!/usr/bin/env bash\nif [ "$1" = show ]; then tr , "\\n" <<< "$3"; else echo "$*" >> "$RUN/scontrol"; fi\n'


def stand_ins(folder: Path, net: dict[str, Host]) -> Path:
    """`srun`, which runs a command on the host that it names, and `scontrol`."""
    folder.mkdir()
    cases = "\n".join(f'{host.address}) exec ip netns exec {host.namespace} "$@";;' for host in net.values())
    for name, body in (("srun", SRUN % cases), ("scontrol", SCONTROL)):
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    return folder


def write_settings(folder: Path, teacher: Host, tiny_model: Path) -> None:
    authority = Authority(folder)
    authority.issue("teacher", [teacher.address], 1)
    authority.issue("student", [], 1)
    (folder / "tokens").write_text("a-secret info,score\n")
    (folder / "token").write_text("a-secret\n")
    tls = {"certificate": "teacher.pem", "key": "teacher.key", "client_ca": "ca.pem"}
    serve = {"model": str(tiny_model), "token_file": str(folder / "tokens"), "max_model_len": 256}
    serve |= {"tls": {name: str(folder / file) for name, file in tls.items()}}
    (folder / "teacher.yaml").write_text(yaml.safe_dump(serve))
    prune_layers(tiny_model, folder / "init", layers=2)
    asked = {"ca": "ca.pem", "certificate": "student.pem", "key": "student.key"}
    cohort = {
        "run": "slurm",
        "teacher": {
            "tls": {name: str(folder / file) for name, file in asked.items()},
            "token_file": str(folder / "token"),
        },
        "defaults": {
            "init": str(folder / "init"),
            "data": {"path": str(write_rows(folder / "rows.jsonl"))},
            "batch": {"sequences": 4, "max_tokens": 96},
            "held_out": {"sequences": 4},
            "steps": STEPS,
            "save_every_steps": 100,
            "objective": {"name": "forward_kl"},
        },
        "students": [{"id": "ann"}, {"id": "bob"}],
    }
    (folder / "cohort.yaml").write_text(yaml.safe_dump(cohort))


def steps_of(run: Path, student: str) -> list[int]:
    path = run / "students" / student / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_at_the_time_limit_the_students_of_a_job_save_and_the_next_one_goes_on(tiny_model, tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    run = tmp_path / "run"
    with TemporaryDirectory() as short, hosts("one", "two", "three") as net:
        write_settings(tmp_path, net["one"], tiny_model)
        path = f"{stand_ins(tmp_path / 'commands', net)}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {
            "RUN": run,
            "COHORT": tmp_path / "cohort.yaml",
            "TEACHER": tmp_path / "teacher.yaml",
            "PATH": path,
        }
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": ",".join(host.address for host in net.values())}
        # Ray's sockets lie there, and their names may have 107 bytes.
        environment |= {"RAY_TMPDIR": short, "PYTHONPATH": ROOT / "proto", "OMP_NUM_THREADS": "1"}

        def started() -> subprocess.Popen[bytes]:
            script = [str(ROOT / "deploy" / "slurm" / "cohort.sbatch")]
            return net["one"].start(script, tmp_path / "log", {key: str(value) for key, value in environment.items()})

        def said() -> str:
            logs = [tmp_path / "log", *(run / "logs").glob("*.log")]
            return "\n".join(f"{each.name}:\n{each.read_text(errors='replace')[-2000:]}" for each in logs)

        job = started()
        wait_until(lambda: len(steps_of(run, "ann")) > 2 or job.poll() is not None, 400)
        assert job.poll() is None, said()
        job.send_signal(signal.SIGTERM)
        assert job.wait(90) == 143, said()
        assert (run / "scontrol").read_text() == "requeue 7\n"
        stopped = len(steps_of(run, "ann"))
        assert 2 < stopped <= STEPS, said()
        assert started().wait(400) == 0, said()
    for student in ("ann", "bob"):
        assert [row["step"] for row in metric_rows(run / "students" / student)] == list(range(STEPS + 1))
