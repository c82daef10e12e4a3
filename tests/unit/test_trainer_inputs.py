"""What a cohort names is looked at before anything is started: models of the hub, short ways, names of two runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from trainer_cases import write_rows
from tutelage.config import validate
from tutelage.data.models import check_model, pinned
from tutelage.errors import CheckpointError, ConfigurationError
from tutelage.names import address_of, check_address, check_host, check_name, name_in_run
from tutelage.trainer.cli import main as train
from tutelage.trainer.config.inputs import checked
from tutelage.trainer.config.run import CohortConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def on_hub(tiny_model, tmp_path, monkeypatch) -> str:
    """A model in the hub's cache, as a fetch of its branch `main` leaves it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub/models--owner--tiny"
    shutil.copytree(tiny_model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    return "owner/tiny"


def cohort(init: Path | str, tmp_path: Path, **besides: object) -> CohortConfig:
    data = write_rows(tmp_path / "rows.jsonl")
    students = [{"id": "ann", "steps": 7}, {"id": "bob", "epochs": 2}]
    defaults = {"init": str(init), "data": {"path": str(data)}, "objective": {"name": "sft"}}
    values = {"output": str(tmp_path / "run"), "teacher": None, "defaults": defaults, "students": students}
    return validate(CohortConfig, values | besides)


def test_a_model_of_the_hub_is_named_with_its_commit(on_hub, tmp_path):
    config = checked(cohort(on_hub, tmp_path))
    assert {str(student.init) for student in config.students} == {f"owner/tiny@{COMMIT}"}
    assert checked(config) == config
    assert pinned(Path(f"{on_hub}@{COMMIT}"), "init") == Path(f"{on_hub}@{COMMIT}")
    with pytest.raises(CheckpointError, match="init: owner/other is no folder here, and the hub does not give it"):
        pinned(Path("owner/other"), "init")


def test_a_folder_stays_what_it_is(tiny_model, tmp_path):
    assert checked(cohort(tiny_model, tmp_path)) == cohort(tiny_model, tmp_path)
    check_model(tiny_model, "init")


def test_settings_for_every_student_lie_over_its_own(tiny_model, tmp_path):
    config = cohort(tiny_model, tmp_path)
    every = config.for_every_student(steps=3, learning_rate=0.5)
    assert [(each.steps, each.epochs, each.optimizer.learning_rate) for each in every.students] == [(3, None, 0.5)] * 2
    assert every.students[0].optimizer.betas == config.students[0].optimizer.betas
    (bob,) = config.for_every_student(only=["bob"]).students
    assert bob == config.students[1]
    with pytest.raises(ConfigurationError, match="'cid' is none of"):
        config.for_every_student(only=["cid"])


def test_the_short_ways_of_the_command_line(tiny_model, tmp_path, capsys):
    file = tmp_path / "cohort.yaml"
    file.write_text(yaml.safe_dump(cohort(tiny_model, tmp_path).model_dump(mode="json")))
    with pytest.raises(SystemExit):
        train(["--config", str(file), "--steps", "3", "--lr", "0.5", "--students", "bob", "--dry-run"])
    (bob,) = yaml.safe_load(capsys.readouterr().out)["students"]
    assert (bob["id"], bob["steps"], bob["epochs"], bob["optimizer"]["learning_rate"]) == ("bob", 3, None, 0.5)


def test_students_of_one_name_in_two_runs_have_two_names():
    assert name_in_run("a", "ann") == "a.ann"
    long = [name_in_run(f"{'r' * 60}{run}", "s" * 64) for run in "12"]
    assert len({*long}) == 2
    assert all(check_name(name, "student") for name in long)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1", ":50051", "host:http", "host:-1", "http://host:50051"]
)
def test_a_port_that_does_not_exist_is_refused(address):
    with pytest.raises(ConfigurationError, match="is no address; give HOST:PORT"):
        check_address(address)
    for allowed in ("[::1]:50051", "dns:///teachers:50051"):
        assert check_address(allowed) == allowed


@pytest.mark.parametrize("host", ["", "0.0.0.0:8000", "here:1"])
def test_a_port_in_a_host_to_listen_on_is_refused(host):
    with pytest.raises(ConfigurationError, match="is no host to listen on"):
        check_host(host)
    assert address_of(check_host("::1"), 1) == "[::1]:1"
