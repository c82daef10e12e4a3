"""The batch script of Slurm, with stand-ins for Slurm's, Ray's and our commands that record how they were called."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "cohort.sbatch"
_RECORD = '#!/usr/bin/env bash\necho "${0##*/} $*" >> "$RECORD"\n'
_STAND_INS = {
    # As Slurm's own, which kills its step when it is told to end.
    "srun": """while [[ $1 == --* ]]; do shift; done
trap 'told=1; kill -KILL $step' TERM
"$@" & step=$!
[ -z "$told" ] || kill -KILL $step
wait $step
""",
    "scontrol": 'if [ "$1" = show ]; then tr , "\\n" <<< "$3"; fi\n',
    "ray": '[ "$1" = status ] || exec sleep 60\n',
    "tutelage": """[ "$1" = train ] || exec sleep 60
until [ "$(grep -c -e '^ray start' -e '^tutelage teacher' "$RECORD")" -ge 4 ]; do sleep 0.05; done
[ -e "$RUN/saved" ] && exit 0
trap 'sleep 0.3; touch "$RUN/saved"; exit "${ENDS_WITH:-143}"' TERM
[ "$CODE" = run ] || exit "$CODE"
while :; do sleep 0.05; done
""",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, body in _STAND_INS.items():
        (commands / name).write_text(_RECORD + body)
        (commands / name).chmod(0o755)
    own = {"RUN": tmp_path / "run", "COHORT": "cohort.yaml", "TEACHER": "teacher.yaml", "RECORD": tmp_path / "record"}
    own |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b,c", "CODE": "run"}
    return os.environ | {key: str(value) for key, value in own.items()} | {"PATH": f"{commands}:{os.environ['PATH']}"}


def _started(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [_SCRIPT], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=30)
        _wait_until_gone(process.pid)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def _wait_until_gone(group: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("something is left of what the script started")


def _record(environment: dict[str, str]) -> list[str]:
    path = Path(environment["RECORD"])
    return path.read_text().splitlines() if path.exists() else []


def _at_the_time_limit(environment: dict[str, str]) -> int:
    process, end = _started(environment), time.monotonic() + 30
    while not any(line.startswith("tutelage train") for line in _record(environment)) and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)  # until the stand-in has its trap
    process.send_signal(signal.SIGTERM)
    return _ended(process)[0]


def test_teacher_ray_and_cohort_are_where_they_belong_and_the_token_is_nowhere_but_in_its_file(
    environment: dict[str, str],
) -> None:
    code, said = _ended(_started(environment | {"CODE": "0"}))
    assert code == 0, said
    record, token = _record(environment), Path(environment["RUN"]) / "ray.token"
    assert "tutelage teacher serve --config teacher.yaml --host a --port 50051" in record
    assert "ray start --head --block --port=6379 --num-cpus=0 --num-gpus=0" in record
    placed = {line.split("--nodelist=")[1] for line in record if line.startswith("srun")}
    assert {"b ray start --block --address=a:6379", "c ray start --block --address=a:6379"} < placed
    train = f"tutelage train --config cohort.yaml --output {environment['RUN']} --ray.address a:6379 "
    assert train + '--teacher.address ["a:50051"]' in record
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    assert token.read_text() not in "\n".join(record)
    assert not any("requeue" in line or line.startswith("ray stop") for line in record)


def test_at_the_time_limit_students_save_and_the_job_is_queued_again_and_goes_on(environment: dict[str, str]) -> None:
    assert _at_the_time_limit(environment) == 143
    assert (Path(environment["RUN"]) / "saved").exists()
    assert _record(environment)[-1] == "scontrol requeue 7"
    token = (Path(environment["RUN"]) / "ray.token").read_text()
    assert _ended(_started(environment))[0] == 0  # as Slurm starts it again
    assert [line for line in _record(environment) if "requeue" in line] == ["scontrol requeue 7"]
    assert (Path(environment["RUN"]) / "ray.token").read_text() == token


@pytest.mark.parametrize("code", ["0", "1"])
def test_a_cohort_that_ends_by_itself_after_it_was_told_is_not_queued_again(
    environment: dict[str, str], code: str
) -> None:
    assert _at_the_time_limit(environment | {"ENDS_WITH": code}) == int(code)
    assert not any("requeue" in line for line in _record(environment))


def test_a_cohort_that_fails_ends_the_job_with_its_code(environment: dict[str, str]) -> None:
    assert _ended(_started(environment | {"CODE": "4"}))[0] == 4
    assert not any("requeue" in line for line in _record(environment))


def test_no_node_left_for_students_is_refused(environment: dict[str, str]) -> None:
    code, said = _ended(_started(environment | {"TEACHER_NODES": "3"}))
    assert (code, said) == (2, "3 nodes, of which the teacher takes 3; students need one more (sbatch --nodes)\n")
    assert not any(line.startswith(("srun", "ray")) for line in _record(environment))
