"""What a study's commands do when its file is not what it was, and with each kind of data file that a trainer reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from study_cases import study_values, write_study
from tutelage import cli as command_line
from tutelage.config import validate
from tutelage.errors import ConfigurationError
from tutelage.runtime.programs import flags
from tutelage.study import cli
from tutelage.study.config import StudyConfig
from tutelage.study.driver import Driver, write_description
from tutelage.study.folder import Folder
from tutelage.study.plan import cost_of
from tutelage.study.resolution import Study, check_inputs, resolve

MODEL = Path("/models/tiny")
TEACHER = {"teachers": {"big": {"model": "tiny"}}, "tuning": {"data": "train.jsonl"}}
DRIVE = """
import sys, time
from pathlib import Path
from tutelage.study.folder import Folder
with Folder(Path(sys.argv[1])).driven():
    print("driving", flush=True)
    time.sleep(600)
"""


@contextmanager
def driver_of(folder: Folder) -> Iterator[subprocess.Popen[bytes]]:
    """A process that drives a study and does nothing."""
    folder.make()
    command = [sys.executable, "-c", DRIVE, str(folder.root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)})
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"driving\n"
        yield process
    finally:
        process.kill()
        process.wait()


def edit(file: Path, **changes: object) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


@pytest.fixture
def planned(tmp_path, monkeypatch) -> Path:
    """A study file that was planned and whose run has begun and ended."""
    file = write_study(tmp_path, MODEL)
    study, folder = cli.planned(file)
    folder.make()
    monkeypatch.setattr(Driver, "_is_done", lambda *_: True)
    Driver(study, folder, print, lambda _done: None).run()
    return file


def test_a_broken_edit_does_not_keep_a_run_from_being_stopped(tmp_path, capsys):
    file = write_study(tmp_path, MODEL)
    with driver_of(Folder(tmp_path / "run")) as process:
        edit(file, settings={"stepz": 3}, students=["nobody"], more=1)
        assert cli.main(["stop", str(file)]) == 0
        assert process.wait(10) != 0
    assert f"process {process.pid} was told to stop" in capsys.readouterr().out
    assert cli.main(["stop", str(file)]) == 0
    assert "nothing runs" in capsys.readouterr().out


def test_a_run_is_stopped_by_its_folder_where_the_file_is_no_yaml_any_more(tmp_path):
    file = write_study(tmp_path, MODEL)
    with driver_of(Folder(tmp_path / "run")) as process:
        file.write_text("name: [")
        with pytest.raises(ConfigurationError, match="give the study's own folder"):
            cli.main(["stop", str(file)])
        assert cli.main(["stop", str(tmp_path / "run")]) == 0
        assert process.wait(10) != 0


@pytest.mark.parametrize("broken", [{"settings": {"stepz": 3}}, {"students": ["nobody"]}, {"more": 1}])
def test_status_and_report_of_a_broken_file_are_those_of_the_last_run(planned, broken, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", _unless_report(subprocess.run, ran))
    edit(planned, **broken)
    assert cli.main(["status", str(planned)]) == 0
    shown = capsys.readouterr()
    assert "tiny: 0 of 3 cells done" in shown.out
    assert "as it was last run" in shown.err
    assert next(iter(broken)) in shown.err
    assert cli.main(["report", str(planned)]) == 0
    assert ran[0][ran[0].index("--study") + 1] == str(planned.parent / "run")
    for command in ("plan", "run"):
        with pytest.raises(ConfigurationError):
            cli.main([command, str(planned)])


def test_a_step_that_is_being_written_does_not_keep_status_from_being_shown(tmp_path, capsys):
    file = write_study(tmp_path, MODEL)
    study, folder = cli.planned(file)
    folder.make()
    cell = study.students[0]
    metrics = folder.path("students", cell.id, "metrics.jsonl")
    metrics.parent.mkdir(parents=True)
    for text, step in (('{"step": 1}\n{"step": 2, "train/lo', 1), ('{"st', 0)):
        metrics.write_text(text)
        assert cli.main(["status", str(file)]) == 0
        assert f"{cell.id}: step {step} of" in capsys.readouterr().out


def _unless_report(run, ran):
    def call(command, **options):
        if "report" not in command:
            return run(command, **options)
        ran.append(command)
        return SimpleNamespace(returncode=0)

    return call


def test_a_folder_stands_for_the_study_that_was_last_run_in_it(planned, capsys):
    planned.unlink()
    assert cli.main(["status", str(planned.parent / "run")]) == 0
    assert "tiny: 0 of 3 cells done" in capsys.readouterr().out
    with pytest.raises(ConfigurationError, match="no study has run in"):
        cli.main(["status", str(planned.parent)])


def test_what_was_last_run_is_the_study_that_was_resolved(planned):
    study, folder = cli.planned(planned)
    assert Study.from_json(json.loads(folder.path("plan.json").read_text())) == study


def test_a_study_that_its_trainer_refuses_is_not_submitted(tmp_path, monkeypatch):
    file = write_study(tmp_path, MODEL, settings={"stepz": 3})
    with pytest.raises(ConfigurationError, match="the trainer refuses this study"):
        cli.main(["run", str(file), "--submit", "http://127.0.0.1:1"])


def resolved(folder: Path, **changes: object) -> Study:
    return resolve(validate(StudyConfig, study_values(folder, MODEL, **changes)))


def test_a_plan_of_parquet_rows_is_that_of_the_same_rows_as_lines(tmp_path):
    lines = resolved(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "train.json").write_text(json.dumps(rows))
    expected = cost_of(lines, Folder(tmp_path / "run"))
    assert expected.trained_tokens > 0
    for name in ("train.parquet", "train.json"):
        cost = cost_of(resolved(tmp_path, data=str(tmp_path / name)), Folder(tmp_path / "run"))
        assert replace(cost, source=expected.source) == expected  # which names a cell


RATIONALES = {
    "teachers": {"big": {"model": "tiny", "tuned": False}},
    "methods": {
        "short": {"objective": {"name": "seq_kd"}, "data": "rationales", "settings": {"batch": {"max_tokens": 48}}},
        "long": {"objective": {"name": "seq_kd"}, "data": "rationales"},
        "plain": {
            "objective": {"name": "seq_kd"},
            "data": "rationales",
            "settings": {"data": {"template": "plain"}},
        },
    },
    "grid": [{"methods": ["short", "long", "plain"]}],
    "seeds": [0],
}


class Recording(Driver):
    """Notes the commands that it would run, and makes the file of what a teacher would write."""

    def __init__(self, study: Study, folder: Folder) -> None:
        super().__init__(study, folder, print, lambda _done: None)
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def _command(self, command: list[str], log_name: str, environment: Mapping[str, str] = {}) -> None:
        self.commands.append(command)
        self.environments.append(environment)
        if "--out" in command:
            Path(command[command.index("--out") + 1]).write_text("{}\n")

    def _look(self) -> None:
        pass


def taught(study: Study, folder: Folder, tiny_model: Path) -> tuple[list[list[str]], dict]:
    """The commands that write completions, and the cohort that is trained on them."""
    folder.make()
    driver = Recording(study, folder)
    driver._teach("big", {"big": SimpleNamespace(address="127.0.0.1:1", close=lambda: None)})
    written = [command for command in driver.commands if "write" in command]
    return written, yaml.safe_load(folder.path("cohorts", "big.yaml").read_text())


def test_students_look_for_test_items_where_the_evaluator_has_them(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.study.driver.note_usage", lambda *_: None)
    config = validate(StudyConfig, study_values(tmp_path, tiny_model, **RATIONALES))
    study, folder = resolve(config), Folder(tmp_path / "run")
    serve = {"serve": config.evaluation.serve | {"data_dir": "/data"}}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=serve)})
    folder.make()
    driver = Recording(replace(study, config=config), folder)
    driver._teach("big", {"big": SimpleNamespace(address="127.0.0.1:1", close=lambda: None)})
    assert driver.environments[-1] == {"TUTELAGE_EVALUATE_DATA_DIR": "/data"}


def test_every_method_finds_what_its_teacher_wrote_for_it(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.study.driver.note_usage", lambda *_: None)
    values = study_values(tmp_path, tiny_model, **RATIONALES)
    study, folder = resolve(validate(StudyConfig, values)), Folder(tmp_path / "run")
    written, cohort = taught(study, folder, tiny_model)
    files = {student["data"]["path"] for student in cohort["students"]}
    assert len(cohort["students"]) == 3
    assert all(Path(file).is_file() for file in files)
    # What a teacher writes depends on the template and not on the length that a student is trained with.
    assert sorted(command[command.index("--template") + 1] for command in written) == ["chat", "plain"]


def test_a_teacher_of_several_is_all_its_members_at_once(tiny_model, tmp_path, monkeypatch):
    noted = []
    monkeypatch.setattr("tutelage.study.driver.note_usage", lambda name, address, *_: noted.append((name, address)))
    teachers = {
        "math": {"model": "tiny", "tuned": False},
        "code": {"model": "other", "tuned": False},
        "both": {"members": ["math", "code"]},
    }
    values = study_values(tmp_path, tiny_model, teachers=teachers, seeds=[0])
    values["models"]["other"] = {"path": str(tiny_model), "parameters": 900_000, "hidden_size": 256}
    values["grid"] = [{"methods": ["kd"], "teachers": ["math", "both"]}]
    study, folder = resolve(validate(StudyConfig, values)), Folder(tmp_path / "run")
    assert [cell.teacher for cell in study.students] == ["math", "both"]
    assert study.members("both") == ("math", "code")
    costs = {cost.teacher: cost for cost in cost_of(study, folder).teachers}
    assert costs["both"].hidden_bytes == 2 * costs["math"].hidden_bytes, "as if all were asked of the widest"
    folder.make()
    driver, closed = Recording(study, folder), []
    services = {
        name: SimpleNamespace(address=f"127.0.0.1:{port}", close=lambda name=name: closed.append(name))
        for port, name in enumerate(("math", "code"), 1)
    }
    driver._teach("both", services)
    cohort = yaml.safe_load(folder.path("cohorts", "both.yaml").read_text())
    assert cohort["teacher"] is None
    assert cohort["teachers"] == {"math": {"address": "127.0.0.1:1"}, "code": {"address": "127.0.0.1:2"}}
    assert noted == [("math", "127.0.0.1:1"), ("code", "127.0.0.1:2")]
    assert closed == ["math", "code"]
    write_description(study, folder)
    described = json.loads(folder.path("study.json").read_text())["teachers"]
    assert described["both"] == {"cell": "", "tuned": True}
    # Another member is another teacher, and so another cell.
    values["teachers"]["both"] = {"members": ["math"]}
    assert resolve(validate(StudyConfig, values)).students[1].id != study.students[1].id


def test_data_on_the_hub_stays_the_hubs_in_every_command(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.study.driver.note_usage", lambda *_: None)
    cached = tmp_path / "cache" / "train.jsonl"
    values = study_values(tmp_path, tiny_model, **RATIONALES, data="hf://datasets/ann/sums@v2/train.jsonl")
    values["grid"] = [{"methods": ["long", "kd"]}]
    values["methods"]["kd"] = {"objective": {"name": "forward_kl"}}
    cached.parent.mkdir()
    cached.write_text((tmp_path / "train.jsonl").read_text())
    for module in ("tutelage.study.resolution", "tutelage.study.plan", "tutelage.data.rows"):
        monkeypatch.setattr(f"{module}.local_file", lambda path: cached if path.parts[0] == "hf:" else path)
    study, folder = resolve(validate(StudyConfig, values)), Folder(tmp_path / "run")
    assert cost_of(study, folder).trained_tokens > 0
    written, cohort = taught(study, folder, tiny_model)
    (command,) = written
    assert command[command.index("--data") + 1] == "hf:/datasets/ann/sums@v2/train.jsonl"
    paths = {student["data"]["path"] for student in cohort["students"]}
    assert "hf:/datasets/ann/sums@v2/train.jsonl" in paths
    before = [cell.id for cell in study.students]
    cached.write_text(cached.read_text().replace("Ann", "Ben"))
    assert [cell.id for cell in resolve(study.config).students] != before


def test_whoever_asks_a_studys_teacher_is_told_how(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.study.driver.note_usage", lambda *_: None)
    access = {"tls": {"ca": "ca.pem", "certificate": "me.pem", "key": "me.key"}, "token_file": "my.token"}
    values = study_values(tmp_path, tiny_model, **RATIONALES)
    values["teachers"] = {"big": {"model": "tiny", "tuned": False, "address": "teacher.example:50051", **access}}
    study, folder = resolve(validate(StudyConfig, values)), Folder(tmp_path / "run")
    written, cohort = taught(study, folder, tiny_model)
    assert cohort["teacher"] == {"address": "127.0.0.1:1", **access}
    told = subprocess.run([*written[0], "--print-config"], check=True, capture_output=True).stdout
    assert {key: yaml.safe_load(told)[key] for key in access} == access
    with pytest.raises(ConfigurationError, match=r"teachers\.big\.tls\.ca: cannot read ca\.pem"):
        check_inputs(study)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("teachers.big.serve", {"teachers": {"big": {"model": "tiny", "tuned": False, "serve": {"host": "10.0.0.4"}}}}),
        ("evaluation.serve", {"evaluation": {"tasks": [{"task": "gsm8k"}], "serve": {"host": "10.0.0.4"}}}),
    ],
)
def test_a_server_of_a_study_that_would_be_open_is_refused_before_anything_is_started(tmp_path, section, changes):
    with pytest.raises(ConfigurationError, match=rf"{section}\.host: 10\.0\.0\.4 can be reached .* without encryption"):
        resolved(tmp_path, **changes)


def test_an_evaluator_that_is_served_already_is_named_with_its_frames(tmp_path):
    tasks = {"tasks": [{"task": "gsm8k"}]}
    with pytest.raises(ConfigurationError, match="give both or neither"):
        resolved(tmp_path, evaluation=tasks | {"address": "evaluator:50052"})
    served = {"address": "evaluator:50052", "frames": "/frames"}
    with pytest.raises(ConfigurationError, match="told by who served it"):
        resolved(tmp_path, evaluation=tasks | served | {"serve": {"prompt": "chat"}})
    study = resolved(tmp_path, evaluation=tasks | served)
    assert study.config.frames == Path("/frames")
    other = replace(study, config=validate(StudyConfig, study_values(tmp_path, MODEL, evaluation=tasks)))
    # Where it is scored is no part of what is scored.
    assert study.evaluation_id(study.students[0]) == other.evaluation_id(other.students[0])


def test_flags_of_a_served_teacher_are_those_of_its_command():
    options = {"enable_expert_parallel": True, "enable_dbo": False, "tensor_parallel_size": 8, "store.path": Path("s")}
    expected = ["--enable-expert-parallel", "--no-enable-dbo", "--tensor-parallel-size", "8", "--store.path", "s"]
    assert flags(options) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_ended_by_a_signal_says_how_to_go_on(number, code, tiny_model, tmp_path, monkeypatch, capsys):
    def ended(self: Driver) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(Driver, "run", ended)
    file = write_study(tmp_path, tiny_model)
    assert command_line.main(["study", "run", str(file)]) == code
    word = "terminated" if code == 143 else "interrupted"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"tutelage study: {word}; what is done stays; to go on: tutelage study resume {file}"
    assert Folder(tmp_path / "run").driver() is None
