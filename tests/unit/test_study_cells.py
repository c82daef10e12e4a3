"""Cells: which there are, what makes two of them the same, and what a study file must not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from study_cases import study_values
from tutelage.config import validate
from tutelage.errors import ConfigurationError, Conflict
from tutelage.study.cells import Cell, base_cells, student_cells, tuning_cells
from tutelage.study.config import StudyConfig
from tutelage.study.folder import Folder
from tutelage.study.plan import cost_of
from tutelage.study.resolution import Study, cohort, resolve
from tutelage.trainer.config.run import CohortConfig

MODEL = Path("/models/tiny")
TEACHER = {"teachers": {"big": {"model": "tiny"}}, "tuning": {"data": "train.jsonl"}}


@pytest.fixture
def config(tmp_path):
    def make(**changes) -> StudyConfig:
        return validate(StudyConfig, study_values(tmp_path, MODEL, **changes))

    return make


def keys(cells: list[Cell]) -> list[tuple[str, str, float, float, int]]:
    return [(cell.method, cell.teacher, cell.temperature, cell.noise, cell.seed) for cell in cells]


def test_a_cell_that_several_blocks_name_is_there_once(config):
    grid = [{"methods": ["sft", "kd"]}, {"methods": ["kd"], "temperatures": [1, 2], "noises": [0, 5]}]
    cells = student_cells(config(**TEACHER, grid=grid, seeds=[0]))
    assert keys(cells) == [
        ("sft", "", 1.0, 0.0, 0),
        ("kd", "big", 1.0, 0.0, 0),
        ("kd", "big", 1.0, 5.0, 0),
        ("kd", "big", 2.0, 0.0, 0),
        ("kd", "big", 2.0, 5.0, 0),
    ]
    assert cells[2].settings["objective"] == {"name": "forward_kl", "temperature": 1.0, "noise": 5.0}


def test_temperature_does_not_multiply_what_never_asks_the_teacher(config):
    methods = {"sft": {"objective": {"name": "sft"}}, "seq_kd": {"objective": {"name": "seq_kd"}, "data": "rationales"}}
    grid = [{"methods": ["sft", "seq_kd"], "temperatures": [1, 2, 5]}]
    cells = student_cells(config(**TEACHER, methods=methods, grid=grid, seeds=[0]))
    assert keys(cells) == [("sft", "", 1.0, 0.0, 0), ("seq_kd", "big", 1.0, 0.0, 0)]


def test_models_start_as_they_are_or_from_the_base_training(config):
    assert [cell.settings for cell in base_cells(config())] == [{}]
    trained = base_cells(config(base={"data": "facts.jsonl", "settings": {"steps": 3}}))
    assert [(cell.role, cell.settings["steps"], cell.objective) for cell in trained] == [("base", 3, "sft")]


def test_only_tuned_teachers_that_the_study_serves_are_tuned(config):
    assert [cell.model for cell in tuning_cells(config(**TEACHER))] == ["tiny"]
    served = {"model": "tiny", "tuned": False, "address": "127.0.0.1:1"}
    assert tuning_cells(config(teachers={"big": served, "raw": {"model": "tiny", "tuned": False}})) == []


def test_a_methods_settings_lie_over_the_studys_as_a_students_over_its_defaults(config):
    method = {"objective": {"name": "gkd"}, "settings": {"batch": {"sequences": 4}, "objective": {"beta": 0.25}}}
    under = {"batch": {"sequences": 8, "max_tokens": 64}, "objective": {"name": "sft", "ignored": 1}, "steps": 3}
    (cell, *_) = student_cells(
        config(methods={"m": method}, grid=[{"methods": ["m"]}], settings=under, seeds=[0], **TEACHER)
    )
    assert cell.settings["batch"] == {"sequences": 4, "max_tokens": 64}
    assert cell.settings["objective"] == {"name": "gkd", "temperature": 1.0, "noise": 0.0, "beta": 0.25}
    assert cell.settings["steps"] == 3


@pytest.fixture(scope="module")
def resolved(tmp_path_factory) -> Study:
    """One dry run of the trainer for several tests."""
    folder = tmp_path_factory.mktemp("study")
    return resolve(validate(StudyConfig, study_values(folder, MODEL)))


def test_an_id_names_every_setting_that_decides_the_result(resolved):
    first, second = resolved.students
    filled = {**first.settings, "id": "x", "init": "y"}
    assert first.id.startswith("tiny-sft-s0-")
    assert first.id != second.id
    same = first.named(filled, first.start, {"data": "a"})
    assert first.named({**filled, "id": "other", "init": "elsewhere"}, first.start, {"data": "a"}).id == same.id
    changed = {**filled, "optimizer": {**filled["optimizer"], "learning_rate": 1e-5}}
    assert first.named(changed, first.start, {"data": "a"}).id != same.id
    assert first.named(filled, "another start", {"data": "a"}).id != same.id
    assert first.named(filled, first.start, {"data": "b"}).id != same.id


def test_other_tasks_are_another_scoring_of_the_same_cell(resolved):
    evaluation = resolved.config.evaluation.model_copy(update={"serve": {"prompt": "alpaca"}})
    other = Study(resolved.config.model_copy(update={"evaluation": evaluation}), (), (), resolved.students)
    cell = resolved.students[0]
    assert resolved.evaluation_id(cell) != other.evaluation_id(cell)


def test_the_trainers_own_words_refuse_a_setting(config):
    with pytest.raises(ConfigurationError, match=r"the trainer refuses this study: .*stepz.*did you mean"):
        resolve(config(settings={"stepz": 3}))


def test_a_servers_own_words_refuse_a_flag_before_anything_is_trained(config):
    task = config().evaluation.tasks[0].model_dump()
    with pytest.raises(ConfigurationError, match=r"evaluation.serve: the evaluator refuses .*promt"):
        resolve(config(evaluation={"tasks": [task], "serve": {"promt": "chat"}}))
    teachers = {"big": {"model": "tiny", "tuned": False, "serve": {"max_model_length": 64}}}
    with pytest.raises(ConfigurationError, match=r"teachers.big.serve: the teacher refuses .*max-model-length"):
        resolve(config(teachers=teachers, evaluation={"tasks": [task]}))


def test_a_comparison_without_its_cells_is_refused_before_anything_runs(config):
    missing = {"name": "x", "family": "f", "first": {"method": "kd"}, "second": {"method": "sft"}}
    with pytest.raises(ConfigurationError, match="x: its sides have 0 and 2 cells"):
        resolve(config(comparisons=[missing]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"students": ["other"]}, "'other' is not there; choose from tiny"),
        ({"grid": [{"methods": ["gkd"]}]}, "'gkd' is not there; choose from sft, kd"),
        ({"grid": [{"methods": ["kd"]}]}, "a method needs a teacher and there is none"),
        ({"teachers": {"big": {"model": "tiny"}}}, "big is to be tuned; say how in `tuning`"),
        ({"teachers": {"big": {"tuned": False}}}, "is of a model, or has members"),
        ({"teachers": {"both": {"members": ["big"]}}}, "'big' is not there"),
        (
            {"teachers": {"big": {"model": "tiny", "tuned": False}, "both": {"members": ["big"], "address": "a:1"}}},
            "its members are served",
        ),
        (
            {**TEACHER, "teachers": {"big": {"model": "tiny", "address": "a:1"}}},
            "big is served at a:1 already, and so is not tuned here; set tuned: false",
        ),
        (
            {"teachers": {"big": {"model": "tiny", "tuned": False, "address": "a:1", "serve": {"dtype": "half"}}}},
            "the teacher at `address` was told by who served it",
        ),
        (
            {
                "teachers": {"both": {"members": ["big"]}, "big": {"model": "tiny", "tuned": False}},
                "methods": {"seq_kd": {"objective": {"name": "seq_kd"}, "data": "rationales"}},
                "grid": [{"methods": ["seq_kd"]}],
            },
            "seq_kd learns from what its teacher writes, and both is several",
        ),
        ({"claims": [{"text": "t", "family": "none", "expects": "equivalent"}]}, "'none' is not there"),
        (
            {
                "comparisons": [
                    {
                        "name": "c",
                        "family": "f",
                        "first": {"method": "sft"},
                        "second": {"method": "sft"},
                        "tasks": ["nine"],
                    }
                ]
            },
            r"comparisons\.c\.tasks: 'nine' is not there; choose from",
        ),
        (
            {"claims": [{"text": "t", "trend": "size", "expects": "first higher"}]},
            "is none of negative, positive, none",
        ),
        ({"claims": [{"text": "t", "expects": "negative"}]}, "names None and None; give one"),
    ],
)
def test_what_a_study_file_must_not_say(config, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        config(**changes)


def test_a_plan_counts_what_is_missing_and_shared(resolved):
    folder = Folder(resolved.config.output)
    folder.make()
    before = cost_of(resolved, folder)
    assert (before.done, before.missing) == (0, 3)
    cell = resolved.students[0]
    folder.finish(cell, {"evaluation_id": resolved.evaluation_id(cell)})
    assert (cost_of(resolved, folder).done, cost_of(resolved, folder).missing) == (1, 2)
    assert before.hours is None


def test_the_trainer_is_told_the_tasks_and_what_it_notes_of_them_is_said_once(resolved):
    config, cells = resolved.config, resolved.students
    content = cohort(config, cells, {cell.id: Path("start") for cell in cells}, {"teacher": {"address": "127.0.0.1:1"}})
    told = CohortConfig.model_validate(content).evaluator
    assert (told.address, told.tasks) == (None, config.evaluation.tasks)
    folder = Folder(config.output)
    folder.make()
    assert folder.noted(cells) == []
    note, ok = ({"topic": "test items", "state": state, "text": state} for state in ("note", "ok"))
    (config.output / "preflight.json").write_text(
        json.dumps({cell.id: [ok, note] for cell in cells} | {"gone": [note]})
    )
    assert folder.noted(cells) == ["test items: note"]
    assert folder.noted(cells[:0]) == []


def test_one_process_drives_a_study(tmp_path):
    folder = Folder(tmp_path)
    folder.make()
    assert folder.driver() is None
    with folder.driven():
        assert folder.driver() is not None
        with pytest.raises(Conflict, match="runs the study in"), Folder(tmp_path).driven():
            pass
    assert folder.driver() is None
