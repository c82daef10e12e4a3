"""Controls, budgets of tokens and unanswered prompts in whole trainings, with a tiny real model and no network."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.errors import ConfigurationError
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import token_sequence
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.training.batch_builder import shuffled
from tutelage.trainer.training.control import Control
from tutelage.trainer.training.loop import train


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return InProcessTeacher(tiny_model)


@pytest.fixture(scope="module")
def student(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    prune_layers(tiny_model, folder, layers=2)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def losses(folder):
    return [row["train/loss"] for row in metric_rows(folder) if "train/loss" in row]


def sequence(length, teacher=None):
    ids = np.arange(length, dtype=np.int32)
    return token_sequence(ids[:2], ids[2:], loss_on_prompt=False, teacher=teacher)


def test_shuffled_answers_are_those_of_another_prompt_at_the_length_of_this_one():
    sequences = {0: sequence(4), 1: sequence(6), 2: sequence(5)}  # two completions a prompt
    answers = {
        index: {
            "hidden_RD": np.full((each.rows, 3), index, np.uint16),
            "target_logits": np.arange(each.rows, dtype=np.float32) + 10 * index,
        }
        for index, each in sequences.items()
    }
    given = shuffled(sequences, answers, completions=2)
    assert [each["hidden_RD"][:, 0].tolist() for each in given.values()] == [[2, 2], [2, 2, 2, 2], [0, 0, 0]]
    assert given[1]["target_logits"].tolist() == [20.0, 21.0, 22.0, 20.0]
    with pytest.raises(ConfigurationError, match="one prompt only that its teacher is asked about"):
        shuffled({0: sequence(4, "a"), 2: sequence(5, "b")}, answers, completions=2)


@pytest.mark.parametrize("objective", [{"name": "forward_kl"}, {"name": "policy_gradient_kl"}])
def test_a_shuffled_teacher_is_another_teacher_of_the_same_batches(objective, teacher, student, data, tmp_path):
    changed = objective | {"shuffle_teacher": True}
    for name, given in (("own", objective), ("others", changed), ("again", changed)):
        train(student_config(student, data, objective=given), folder=tmp_path / name, teacher=teacher)
    assert losses(tmp_path / "others") == losses(tmp_path / "again")
    own, others = (metric_rows(tmp_path / name)[1] for name in ("own", "others"))
    # Not the loss: of completions of one length the mean of the rewards is the same, whoever's they are.
    assert others["train/forward_kl"] != pytest.approx(own["train/forward_kl"], rel=0.01)
    assert own["train/tokens"] == others["train/tokens"]


def test_from_a_teacher_equal_to_the_student_nothing_is_learned(teacher, student, data, tmp_path):
    objective = {"name": "forward_kl", "equal_teacher": True}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        train(student_config(student, data, objective=objective, dtype=dtype), folder=folder, teacher=teacher)
        assert losses(folder)[0] < 1e-6
        held = [row["heldout/forward_kl"] for row in metric_rows(folder) if "heldout/forward_kl" in row]
        assert held[0] == pytest.approx(held[-1], rel=0.1)  # of the run's own teacher, as far as before
        assert held[0] > 0.1
        assert max(losses(folder)) < 1e-2


def test_the_start_stays_the_teacher_after_a_stop(teacher, student, data, tmp_path):
    objective = {"name": "reverse_kl", "equal_teacher": True, "temperature": 2.0, "on_policy_fraction": 1.0}
    config = student_config(student, data, objective=objective)
    train(config, folder=tmp_path / "whole", teacher=teacher)
    control = Control()

    def report(progress):
        if progress.step >= 3:
            control.stop()

    train(config, folder=tmp_path / "parts", teacher=teacher, report=report, control=control)
    train(config, folder=tmp_path / "parts", teacher=teacher)
    assert metric_rows(tmp_path / "parts") == metric_rows(tmp_path / "whole")


@pytest.mark.parametrize(("unit", "metric"), [("scored_tokens", "tokens"), ("teacher_tokens", "teacher_tokens")])
def test_a_training_ends_with_the_step_that_spends_its_budget(unit, metric, teacher, student, data, tmp_path):
    config = student_config(
        student, data, objective={"name": "forward_kl"}, steps=50, budget={unit: 600}, save_every_steps=2
    )
    done = train(config, folder=tmp_path / "whole", teacher=teacher)
    rows = [row for row in metric_rows(tmp_path / "whole") if "train/tokens" in row]
    spent = [row[f"train/{metric}"] for row in rows]
    assert sum(spent[:-1]) < 600 <= sum(spent)
    assert done.step == len(rows) < 50
    assert json.loads((tmp_path / "whole/outcome.json").read_text()) == {"step": done.step}
    rates = [row["train/learning_rate"] for row in rows]
    # After the warm-up the cosine comes down with what is spent, and not with 50 steps.
    for rate, before in zip(rates[1:], np.cumsum(spent)[:-1], strict=True):
        share = round(1000 * before / 600) / 1000
        assert rate == pytest.approx(config.optimizer.learning_rate * (1 + np.cos(np.pi * share)) / 2, rel=0.01)
    assert "heldout/forward_kl" in rows[-1]

    control = Control()

    def report(progress):
        if progress.step >= 2:
            control.stop()

    train(config, folder=tmp_path / "parts", teacher=teacher, report=report, control=control)
    train(config, folder=tmp_path / "parts", teacher=teacher)
    assert metric_rows(tmp_path / "parts") == metric_rows(tmp_path / "whole")


def test_prompts_without_answers_are_the_students_own_beside_rows_that_have_them(teacher, student, data, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"How many are {i}?"}) + "\n" for i in range(20)))
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}."}) + "\n" for i in range(4)))
    config = student_config(
        student,
        data,
        objective={"name": "forward_kl", "on_policy_fraction": 0.001},
        held_out={"sequences": 4, "data": {"path": str(held)}},
    )
    sources = [{"path": str(data)}, {"path": str(prompts)}]
    config = StudentConfig.model_validate(config.model_dump() | {"data": sources})
    train(config, folder=tmp_path / "run", teacher=teacher)
    rows = [row for row in metric_rows(tmp_path / "run") if "train/tokens" in row]
    own = sum(row["train/own_sequences"] for row in rows)
    assert own == round(rows[-1]["train/share/1-prompts"] * 4 * len(rows))
    assert 0 < own < 4 * len(rows)
