"""What the configuration of a cohort accepts, fills in, and refuses with advice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from tutelage.config import load, to_yaml, validate
from tutelage.errors import ConfigurationError
from tutelage.trainer.config.objective import PARAMETERS, ObjectiveConfig
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import LoraConfig, OptimizerConfig, StudentDefaults
from tutelage.trainer.losses.registry import OBJECTIVES

STUDENT = {"id": "ann", "init": "student", "data": {"path": "rows.jsonl"}}


def cohort(**values):
    base = {"defaults": {"init": "student", "data": {"path": "rows.jsonl"}}, "students": [{"id": "ann"}]}
    return validate(CohortConfig, base | values)


def test_every_parameter_of_the_table_is_a_field():
    assert {name for row in OBJECTIVES.values() for name in row.parameters} == set(PARAMETERS)
    assert set(PARAMETERS) <= set(ObjectiveConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "fraction", "signal"),
    [
        ("gkd", 0.5, "hidden"),
        ("reverse_kl", 0.0, "hidden"),
        ("sft", 0.0, None),
        ("policy_gradient_kl", 1.0, "topk"),
        ("paper_code/gkd", 0.5, "hidden"),
    ],
)
def test_what_is_left_out_comes_from_the_table(name, fraction, signal):
    objective = ObjectiveConfig(name=name)
    assert (objective.on_policy_fraction, objective.signal) == (fraction, signal)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"name": "gdk"}, "did you mean gkd"),
        ({"name": "forward_kl", "signal": "topk", "noise": 1.0}, "use hidden, or say approximate: true"),
        ({"name": "reverse_kl", "signal": "topk"}, "use hidden or candidates"),
        ({"name": "reverse_kl", "beta": 0.5}, "has no parameter 'beta'"),
        ({"name": "gkd", "beta": 1.5}, r"\[0, 1\]"),
        ({"name": "sft", "on_policy_fraction": 0.5}, "must be 0"),
        ({"name": "policy_gradient_kl", "on_policy_fraction": 0.5}, "must be 1"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"temperature": float("inf")}, "finite"),
        ({"student_temperature": -1.0}, "greater than 0"),
        ({"noise": float("nan")}, "finite|greater"),
        ({"name": "reverse_kl", "teacher_top_k": 8}, "probability 0"),
    ],
)
def test_refusals_say_what_to_do(values, advice):
    with pytest.raises((ValidationError, ConfigurationError), match=advice):
        ObjectiveConfig(**values)


def test_an_approximation_is_accepted_when_it_is_said_and_is_kept():
    objective = ObjectiveConfig(name="forward_kl", signal="topk", noise=1.0, approximate=True)
    assert objective.model_dump()["approximate"] is True


def test_students_take_the_defaults_key_by_key_but_objectives_whole():
    config = cohort(
        defaults={
            "init": "student",
            "data": {"path": "rows.jsonl"},
            "objective": {"name": "gkd", "beta": 0.3},
            "optimizer": {"learning_rate": 0.01, "max_grad_norm": 2.0},
        },
        students=[
            {"id": "ann", "objective": {"temperature": 2.0}},
            {"id": "bob", "objective": {"name": "reverse_kl"}, "optimizer": {"max_grad_norm": 3.0}},
        ],
    )
    ann, bob = config.students
    assert (ann.objective.name, ann.objective.beta, ann.objective.temperature) == ("gkd", 0.3, 2.0)
    assert (bob.objective.name, bob.objective.beta, bob.objective.on_policy_fraction) == ("reverse_kl", None, 0.0)
    assert (bob.optimizer.learning_rate, bob.optimizer.max_grad_norm) == (0.01, 3.0)


@pytest.mark.parametrize("whose", ["defaults", "students.0"])
@pytest.mark.parametrize(
    ("section", "model"), [("", StudentDefaults), ("optimizer.", OptimizerConfig), ("lora.", LoraConfig)]
)
def test_an_old_name_is_refused_with_the_new_one_named(whose, section, model):
    for old, new in model.RENAMED.items():
        assert new in model.model_fields
        settings = {section.rstrip("."): {old: 1}} if section else {old: 1}
        values = {"defaults": settings} if whose == "defaults" else {"students": [STUDENT | settings]}
        with pytest.raises(ConfigurationError, match=rf"{whose}\.{section}{old} .*{whose}\.{section}{new} now"):
            validate(CohortConfig, values)


def test_the_resolved_file_reads_back_to_the_same(tmp_path):
    config = cohort(evaluator={"tasks": [{"task": "addsub"}]})
    path = tmp_path / "cohort.yaml"
    path.write_text(to_yaml(config))
    assert load(CohortConfig, ["--config", str(path)], program="t", environment_prefix="T_") == config


def test_dotted_flags_reach_every_student(tmp_path):
    path = tmp_path / "cohort.yaml"
    path.write_text(
        "defaults: {init: s, data: {path: d.jsonl}, steps: 7}\nstudents: [{id: ann}, {id: bob, steps: 9}]\n"
    )
    arguments = ["--config", str(path), "--defaults.steps", "3", "--defaults.optimizer.max-grad-norm", "0.5"]
    config = load(CohortConfig, arguments, program="t", environment_prefix="T_")
    assert [student.steps for student in config.students] == [3, 9]
    assert {student.optimizer.max_grad_norm for student in config.students} == {0.5}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"students": [{"id": "../ann"}]}, "is not a name"),
        ({"students": [{"id": "ann"}, {"id": "ann"}]}, "occurs twice"),
        ({"run": "my run"}, "is not a name"),
        ({"teacher": None}, "give its address"),
        ({"students": [{"id": "ann", "stepz": 3}]}, "stepz is not a key"),
        ({"evaluator": {"tasks": [], "every_steps": 7}}, "no multiple of save_every_steps"),
    ],
)
def test_cohorts_that_cannot_run_are_refused(values, problem):
    with pytest.raises(ConfigurationError, match=problem):
        cohort(**values)


def test_a_cohort_without_teacher_may_learn_from_its_data_alone():
    assert cohort(teacher=None, students=[{"id": "ann", "objective": {"name": "sft"}}]).teacher is None


def test_help_needs_nothing_heavy():
    program = (
        "import sys, contextlib, io\n"
        "from tutelage.trainer.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main(['--help'])\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'polars', 'grpc') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
