"""Images: sound to hadolint, pinned, of a user without rights; entry points start as they stand in the files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from tutelage.evaluator.config import ServeConfig
from tutelage.rpc.health import is_serving
from tutelage.teacher_server.config import TeacherConfig

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))
RUN = "import sys; from tutelage.cli import main; sys.exit(main())"


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def values(path: Path, name: str) -> list[str]:
    return [rest for each, rest in instructions(path) if each == name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_hadolint_has_nothing_to_say(path):
    program = Path(sys.executable).with_name("hadolint")
    found = str(program) if program.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed")
    said = subprocess.run([found, str(path)], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_it_begins_with_is_pinned_and_its_user_has_no_rights(path):
    stages = {rest.split(" AS ")[1] for rest in values(path, "FROM") if " AS " in rest}
    for base in {rest.split(" AS ")[0] for rest in values(path, "FROM")} - stages:
        assert re.search(r"@sha256:[0-9a-f]{64}$|:\d+\.\d+\.\d+-", base), base
    assert values(path, "USER")[-1].split(":")[0] == "10001"
    last = [name for name, _ in instructions(path)]
    assert "RUN" not in last[last.index("USER") :]
    assert not re.search(r"token|secret|password", path.read_text(), re.IGNORECASE)
    assert {".git", "certificates"} <= set((ROOT / ".dockerignore").read_text().splitlines())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_entry_point_starts(path):
    words = [word for name in ("ENTRYPOINT", "CMD") for rest in values(path, name) for word in json.loads(rest)]
    assert words[0] == "tutelage"
    printed = subprocess.run([sys.executable, "-c", RUN, *words[1:]], capture_output=True, text=True, timeout=60)
    assert printed.returncode == 0, printed.stderr
    assert f"usage: {shlex.join(words[:-1])}" in printed.stdout or shlex.join(words[:-1]) in printed.stdout


def test_health_is_asked_where_the_chart_has_the_services_listen():
    chart = ROOT / "deploy" / "helm" / "tutelage" / "templates"
    for name, config in (("teacher", TeacherConfig), ("evaluator", ServeConfig)):
        path = ROOT / "deploy" / "images" / f"{name}.Dockerfile"
        command = json.loads(values(path, "HEALTHCHECK")[0].partition("CMD ")[2])
        assert command[:3] == ["python", "-m", "tutelage.rpc.health"]
        assert "health_port" in config.model_fields
        assert f'"health_port" {command[3].rpartition(":")[2]}' in (chart / f"{name}.yaml").read_text()
    assert is_serving("127.0.0.1:1") is False


def test_the_chart_and_the_lock_have_one_ray():
    values_of_chart = yaml.safe_load((ROOT / "deploy" / "helm" / "tutelage" / "values.yaml").read_text())
    assert f"ray=={values_of_chart['ray']['version']}" in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()


def test_keys_and_tokens_are_kept_out_of_images_and_of_the_repository():
    made = ("certificates/ca.key", "certificates/ca.pem", "biology/biology.key", "biology/biology.token")
    made += ("teacher.token", "teacher.tokens", "ray.token", "grafana.password")
    # A pattern without a folder is git's for all folders, and Docker's for the first alone.
    for file, anywhere in ((".dockerignore", "**/"), (".gitignore", "")):
        lines = (ROOT / file).read_text().splitlines()
        patterns = [line.removeprefix(anywhere) for line in lines if line.startswith(f"{anywhere}*.")]
        assert [path for path in made if not any(fnmatch(Path(path).name, each) for each in patterns)] == [], file
