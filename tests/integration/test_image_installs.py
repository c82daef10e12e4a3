"""What each stage of each image installs, by its own commands, in an empty environment; and that its command runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import venv
from pathlib import Path

import pytest

from wheel_environment import copy_of_sources

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy" / "images"
# By the image and the stage that installs: what the result runs.
STAGES = {
    ("evaluator", "build"): "tutelage evaluate serve --help",
    ("trainer", "build"): "tutelage train --help",
    ("teacher", "build-cpu"): "tutelage teacher serve --help",
    ("teacher", "build-gpu"): "tutelage teacher serve --help",
}


def commands(image: str, stage: str) -> list[str]:
    """The shell commands of a stage that install, those of the stages that it stands on left out."""
    text = (IMAGES / f"{image}.Dockerfile").read_text().replace("\\\n", " ")
    (body,) = re.findall(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("RUN ") for line in body.splitlines() if line.startswith("RUN pip install")]


def test_every_stage_that_installs_is_tried():
    found = {
        (path.stem, stage)
        for path in IMAGES.glob("*.Dockerfile")
        for stage in re.findall(r"^FROM \S+ AS (\S+)$", path.read_text(), re.MULTILINE)
        if commands(path.stem, stage)
    }
    assert found == STAGES.keys()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("image", "stage"), STAGES)
def test_what_a_stage_installs_runs_its_service(image, stage, tmp_path):
    sources = copy_of_sources(tmp_path / "source")
    (sources / "requirements").symlink_to(ROOT / "requirements")
    venv.EnvBuilder(with_pip=True).create(tmp_path / "environment")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TUTELAGE", "VIRTUAL"))}
    environment = kept | {"PATH": f"{tmp_path / 'environment' / 'bin'}:/usr/bin:/bin", "PIP_NO_CACHE_DIR": "1"}
    for command in [*commands(image, stage), STAGES[image, stage], "tutelage doctor"]:
        done = subprocess.run(
            ["bash", "-ec", command], cwd=sources, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    service = shlex.split(STAGES[image, stage])[1]
    name = {"evaluate": "evaluator", "train": "trainer"}.get(service, service)
    said = next(line for line in done.stdout.splitlines() if f" {name} " in line)
    assert "missing" not in said, said
