"""A student of another team attaches: docs/deploy.md's commands, the team's with the trainer's wheel alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from guides import script_of, section
from ray_cluster import wait_until
from trainer_cases import metric_rows
from trainer_cohorts import free_port
from tutelage.runtime.processes import running
from tutelage.trainer.model.layer_pruning import prune_layers
from wheel_environment import Environment, build, copy_of_sources

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text()
INSTALL = {"pip install '.[trainer]'": "command -v tutelage"}  # the environment is made already
RUN = Path("biology-run", "students", "one")


class Shell:
    """One side's terminal, which types the commands below a heading of the page."""

    def __init__(self, folder: Path, variables: dict[str, str], port: int) -> None:
        self.folder, self.variables, self._port = folder, variables, str(port)

    def script(self, title: str, **instead: str) -> str:
        return script_of(section(PAGE, title).replace("50051", self._port), instead)

    def types(self, title: str, **instead: str) -> tuple[int, str]:
        """The exit code, and what was printed."""
        done = subprocess.run(
            ["bash", "-c", self.script(title, **instead)],
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stdout


@pytest.fixture
def operator(tiny_model, tmp_path) -> Shell:
    folder = tmp_path / "operator"
    (folder / "build" / "models").mkdir(parents=True)
    (folder / "build" / "models" / "teacher").symlink_to(tiny_model)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PYTHONPATH": str(ROOT / "proto"), "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return Shell(folder, os.environ | own, free_port())


@pytest.fixture
def team(operator, tiny_model, tmp_path):
    """Has the trainer's wheel with what that asks for, and nothing of a teacher."""
    folder = tmp_path / "team"
    wheel = build("wheel", copy_of_sources(tmp_path / "sources"), tmp_path / "wheel")
    environment = Environment(folder / "environment", wheel, "trainer")
    assert environment.run("python", "-c", "import vllm", cwd=folder).returncode == 1
    prune_layers(tiny_model, folder / "build" / "models" / "student-8-layers", layers=2)
    with TemporaryDirectory() as short:  # Ray's sockets lie below it, and their names may have 107 bytes.
        own = {"RAY_TMPDIR": short, "HF_HUB_OFFLINE": "1"}
        yield Shell(folder, environment.variables | own, int(operator._port))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_student_of_another_team_attaches_with_its_own_token_and_is_refused_without_the_scope(operator, team):
    code, said = operator.types("Certificates and tokens")
    assert code == 0, said
    log, address = operator.folder / "log", operator.folder / "teacher.address"
    serve = ["bash", "-c", f"cd '{operator.folder}'\n{operator.script('The teacher that runs')}"]
    with running(serve, log=log, environment=operator.variables) as teacher:
        wait_until(lambda: address.exists() or teacher.poll() is not None, 240)
        assert teacher.poll() is None, log.read_text()

        code, said = operator.types("What the team is given", **{"info,score": "info"})
        assert code == 0, said
        shutil.copytree(operator.folder / "biology", team.folder / "biology")
        code, said = team.types("The team trains", **INSTALL)
        assert code == 2, said
        assert "this token has not the scope 'score'" in said
        assert not (team.folder / RUN / "metrics.jsonl").exists()

        tokens = operator.folder / "teacher.tokens"
        given = (team.folder / "biology" / "biology.token").read_text().strip()
        tokens.write_text(tokens.read_text().replace(f"{given} info", f"{given} info,score"))
        code, said = team.types("The team trains", **INSTALL)
        assert code == 0, said
        assert [row["step"] for row in metric_rows(team.folder / RUN)] == [0, 1, 2, 3, 4]
        assert (team.folder / RUN / "checkpoints" / "step-00000004" / "MANIFEST.json").exists()

        own = " --certificate biology/biology.pem --key biology/biology.key"
        code, said = team.types("The team trains", **INSTALL, **{own: ""})
        assert code in (2, 3), said
        assert "no teacher answers at" in said or "do not agree on TLS" in said, said

        code, said = operator.types("What it has used, and the end of it")
        assert code == 0, said
        assert "biology.one" in said
        code, said = team.types("The team trains", **INSTALL, **{"biology-run": "later"})
        assert code == 2, said
        assert "not one that this server knows" in said
