"""Methods that start from another one, what they may spend, and what they are told apart from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from study_cases import study_values
from tutelage.config import validate
from tutelage.errors import ConfigurationError
from tutelage.study.cells import student_cells
from tutelage.study.config import StudyConfig
from tutelage.study.folder import Folder
from tutelage.study.resolution import resolve

MODEL = Path("/models/tiny")
TEACHER = {"teachers": {"big": {"model": "tiny", "tuned": False}}}
WARM = {
    "warm": {"objective": {"name": "sft"}, "settings": {"steps": 2}},
    "sft": {"objective": {"name": "sft"}},
    "gkd": {"objective": {"name": "gkd"}, "init": {"method": "warm"}},
}


@pytest.fixture
def config(tmp_path):
    def make(**changes) -> StudyConfig:
        return validate(StudyConfig, study_values(tmp_path, MODEL, **{"seeds": [0]} | TEACHER | changes))

    return make


def test_a_method_starts_from_the_cell_of_another_one_which_the_grid_need_not_name(config):
    study = resolve(config(methods=WARM, grid=[{"methods": ["sft", "gkd"], "temperatures": [1, 2]}], seeds=[0, 1]))
    by_name = {(cell.method, cell.temperature, cell.seed): cell for cell in study.students}
    # One warm-up a seed, whatever the temperatures of what comes after it; the other fine-tuning starts from the base.
    assert sorted(by_name) == [
        ("gkd", 1.0, 0), ("gkd", 1.0, 1), ("gkd", 2.0, 0), ("gkd", 2.0, 1),
        ("sft", 1.0, 0), ("sft", 1.0, 1), ("warm", 1.0, 0), ("warm", 1.0, 1),
    ]  # fmt: skip
    for (method, _, seed), cell in by_name.items():
        assert cell.start == (by_name["warm", 1.0, seed].id if method == "gkd" else str(MODEL))
    assert study.students[0].method == "sft"
    assert [cell.teacher for cell in study.students if cell.method == "warm"] == ["", ""]


def test_another_warm_up_is_another_cell_of_what_starts_from_it(config):
    grid = [{"methods": ["gkd"]}]
    longer = WARM | {"warm": {"objective": {"name": "sft"}, "settings": {"steps": 3}}}
    first, second = (resolve(config(methods=methods, grid=grid)).students[-1] for methods in (WARM, longer))
    assert (first.method, second.method) == ("gkd", "gkd")
    assert first.settings == second.settings
    assert first.id != second.id


def test_what_starts_from_a_distilled_student_is_of_its_teacher(config):
    methods = {"kd": {"objective": {"name": "forward_kl"}}, "sft": WARM["sft"] | {"init": {"method": "kd"}}}
    kd, sft = student_cells(config(methods=methods, grid=[{"methods": ["sft"]}]))
    assert (kd.method, kd.teacher, sft.method, sft.teacher) == ("kd", "big", "sft", "big")


def test_a_budget_of_steps_counts_the_warm_up(config):
    grid = [{"methods": ["sft", "gkd"]}]
    cells = student_cells(config(methods=WARM, grid=grid, budget={"steps": 6}))
    assert {cell.method: cell.settings["steps"] for cell in cells} == {"sft": 6, "warm": 2, "gkd": 4}
    own = WARM | {"sft": {"objective": {"name": "sft"}, "settings": {"steps": 5}}}
    with pytest.raises(ConfigurationError, match=r"methods.sft.settings.steps: 5, but every method spends the budget"):
        student_cells(config(methods=own, grid=grid, budget={"steps": 6}))
    with pytest.raises(ConfigurationError, match=r"methods.gkd.init: what gkd starts from takes 2 of the budget's 2"):
        student_cells(config(methods=WARM, grid=grid, budget={"steps": 2}))
    with pytest.raises(ConfigurationError, match="give one of steps, scored_tokens and teacher_tokens"):
        config(budget={"steps": 2, "scored_tokens": 3})


def test_a_budget_of_tokens_ends_what_spends_them(config):
    grid = [{"methods": ["sft", "gkd"]}]
    scored = student_cells(config(methods=WARM, grid=grid, budget={"scored_tokens": 600}))
    assert {cell.method: cell.ends_by for cell in scored} == {
        "sft": "scored_tokens", "warm": "steps", "gkd": "scored_tokens",
    }  # fmt: skip
    teacher = student_cells(config(methods=WARM, grid=grid, budget={"teacher_tokens": 600}))
    assert {cell.method: cell.ends_by for cell in teacher} == {
        "sft": "steps", "warm": "steps", "gkd": "teacher_tokens",
    }  # fmt: skip


def test_a_cell_that_ends_by_tokens_is_trained_when_its_trainer_says_at_which_step(config, tmp_path):
    study = resolve(config(methods=WARM, grid=[{"methods": ["sft"]}], budget={"scored_tokens": 600}))
    folder, cell = Folder(tmp_path / "run"), study.students[0]
    student = tmp_path / "run/students" / cell.id
    student.mkdir(parents=True)
    (student / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "train/tokens": 400}\n')
    assert (folder.last_step(cell), folder.is_trained(cell), folder.spent(cell, "scored_tokens")) == (0, False, 400)
    (student / "outcome.json").write_text(json.dumps({"step": 7}))
    assert folder.checkpoint(cell).name == "step-00000007"


CONTROLLED = {
    "sft": {"objective": {"name": "sft"}},
    "kd": {"objective": {"name": "forward_kl"}, "controls": ["shuffled", "same_tokens", "equal_teacher"]},
    "pg": {"objective": {"name": "policy_gradient_kl"}, "controls": ["constant_advantage"]},
}


def test_controls_are_methods_beside_their_own(config):
    grid = [{"methods": ["kd"], "temperatures": [1, 2]}, {"methods": ["pg"]}]
    study = resolve(config(methods=CONTROLLED, grid=grid))
    cells = {(cell.method, cell.temperature): cell for cell in study.students}
    names = ["kd", "kd.shuffled", "kd.same_tokens", "kd.equal_teacher"]
    assert list(cells) == [
        *((name, T) for T in (1.0, 2.0) for name in names),
        ("pg", 1.0),
        ("pg.constant_advantage", 1.0),
    ]
    assert cells["kd.shuffled", 2.0].settings["objective"]["shuffle_teacher"]
    assert cells["kd.equal_teacher", 2.0].settings["objective"]["equal_teacher"]
    assert cells["pg.constant_advantage", 1.0].settings["objective"]["estimator"] == "constant_advantage"
    same = cells["kd.same_tokens", 2.0]
    assert (same.objective, same.ends_by, same.as_long_as) == ("sft", "scored_tokens", cells["kd", 2.0].id)
    assert {cell.control_of for cell in study.students} == {"", "kd", "pg"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gkd": WARM["gkd"] | {"init": {"method": "none"}}}, r"methods.gkd.init: 'none' is not there"),
        (
            {"sft": WARM["sft"] | {"init": {"method": "gkd"}}, "gkd": WARM["gkd"] | {"init": {"method": "sft"}}},
            "sft starts from gkd starts from sft, so none is first",
        ),
        ({"sft": WARM["sft"] | {"controls": ["shuffled"]}}, "but sft asks no teacher while it trains"),
        ({"gkd": WARM["gkd"] | {"controls": ["constant_advantage"]}}, "is of policy_gradient_kl, which gkd is not"),
        (
            {"gkd": WARM["gkd"] | {"controls": ["shuffled"]}, "gkd.shuffled": WARM["gkd"]},
            "gkd.shuffled is the name of its control",
        ),
    ],
)
def test_what_a_method_must_not_say(config, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        student_cells(config(methods=WARM | changes, grid=[{"methods": ["gkd"]}]))


def test_a_methods_data_may_be_another_file_or_several(config, tmp_path):
    prompts = {"path": str(tmp_path / "prompts.jsonl")}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Two?"}\n')
    labelled = {"path": str(tmp_path / "train.jsonl"), "weight": 3.0}
    methods = {
        "own": {"objective": {"name": "gkd", "on_policy_fraction": 1}, "data": prompts},
        "both": {"objective": {"name": "gkd"}, "data": [prompts, labelled]},
    }
    own, both = resolve(config(methods=methods, grid=[{"methods": ["own", "both"]}])).students
    assert own.settings["data"]["path"] == prompts["path"]
    assert [each["weight"] for each in both.settings["data"]["sources"]] == [1.0, 3.0]
    assert both.data_paths == [Path(prompts["path"]), Path(labelled["path"])]
    heavier = methods | {"both": {"objective": {"name": "gkd"}, "data": [prompts, labelled | {"weight": 4.0}]}}
    (other,) = resolve(config(methods=heavier, grid=[{"methods": ["both"]}])).students
    assert other.id != both.id
