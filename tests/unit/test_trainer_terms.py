"""Objectives as sums of weighted terms: each on its own sequences, each a mean over its tokens, all in one step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.config import to_yaml
from tutelage.trainer.config.objective import ObjectiveConfig
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.to_tensors import unembedding_of
from tutelage.trainer.training.batch_builder import BatchBuilder
from tutelage.trainer.training.loop import train
from tutelage.trainer.training.step import TrainStep


@pytest.fixture(scope="module")
def teacher(tiny_model):
    return InProcessTeacher(tiny_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def gradient_of_a_step(init, data, teacher, **changes):
    """All gradients of one step as a vector, and its metrics."""
    config = student_config(init, data, dtype="float32", steps=1, **changes)
    student = Student(init, dtype="float32", optimizer=config.optimizer, vocabulary_size=512)
    # Another student than the teacher, the same each time.
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    unembedding = unembedding_of(teacher.unembedding(), student.device)
    batches = BatchBuilder(config, student, teacher, {None: unembedding})
    found = []

    def step(_rate):
        found.append(torch.cat([each.grad.flatten() for each in student.model.parameters()]))
        return 0.0

    student.step = step
    from tutelage.trainer.data.dataset import read_dataset

    examples = read_dataset(data, student.tokenizer, template="chat", max_tokens=96).examples[:4]
    metrics = TrainStep(config, student, batches).train_step(0, lambda _step: examples, lambda _phase: None)
    batches.close()
    return found[0], metrics


TERMS = [
    {"name": "forward_kl", "weight": 0.7},
    {"name": "reverse_kl", "weight": 0.2},
    {"name": "sft", "weight": 0.3},
]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "micro_batch_token_mean"])
def test_a_step_is_the_weighted_sum_of_its_terms_steps(reduction, tiny_model, data, teacher):
    alone = {
        term["name"]: gradient_of_a_step(
            tiny_model, data, teacher, objective={"name": term["name"]}, reduction=reduction
        )
        for term in TERMS
    }
    found, metrics = gradient_of_a_step(tiny_model, data, teacher, objective={"terms": TERMS}, reduction=reduction)
    expected = sum(term["weight"] * alone[term["name"]][0] for term in TERMS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for term in TERMS:
        assert metrics[f"train/term/{term['name']}"] == pytest.approx(alone[term["name"]][1]["train/loss"], rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(
        sum(term["weight"] * alone[term["name"]][1]["train/loss"] for term in TERMS), rel=1e-5
    )


def test_the_common_mixture_with_cross_entropy_is_two_terms(tiny_model, data, teacher):
    common, _ = gradient_of_a_step(
        tiny_model, data, teacher, objective={"name": "forward_kl", "temperature": 2.0, "cross_entropy_weight": 0.3}
    )
    terms = [{"name": "forward_kl", "weight": 0.7}, {"name": "sft", "weight": 0.3}]
    spelt, _ = gradient_of_a_step(tiny_model, data, teacher, objective={"terms": terms, "temperature": 2.0})
    assert torch.equal(common, spelt)


def test_terms_on_the_data_and_on_the_students_own_are_means_over_their_own_tokens(tiny_model, data, teacher):
    """Each term alone, with the other one's weight too small to see, on the very same batch."""
    names = {"forward_kl": "data", "reverse_kl": "own"}
    found, metrics = [], []
    for weights in ((1.0, 1.0), (1.0, 1e-12), (1e-12, 1.0)):
        terms = [
            {"name": name, "sequences": of, "weight": weight}
            for (name, of), weight in zip(names.items(), weights, strict=True)
        ]
        gradient, row = gradient_of_a_step(
            tiny_model, data, teacher, objective={"terms": terms, "on_policy_fraction": 0.5}, seed=2
        )
        found.append(gradient)
        metrics.append(row)
    assert 0 < metrics[0]["train/own_sequences"] < 4
    torch.testing.assert_close(found[0], found[1] + found[2], rtol=1e-4, atol=1e-6)
    assert metrics[0]["train/term/forward_kl@data"] == pytest.approx(metrics[1]["train/loss"], rel=1e-5)
    assert metrics[0]["train/term/reverse_kl@own"] == pytest.approx(metrics[2]["train/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("values", "field", "advice"),
    [
        ({"terms": [{"name": "gdk"}]}, "objective", "did you mean gkd"),
        ({"terms": [{"name": "sft", "sequences": "own"}]}, "sequences", "sequences of data only"),
        ({"terms": [{"name": "policy_gradient_kl", "sequences": "all"}]}, "sequences", "sequences of own only"),
        ({"terms": [{"name": "gkd"}, {"name": "gkd", "beta": 0.1}]}, "terms", "there twice"),
        ({"terms": [{"name": "gkd"}], "beta": 0.0}, "terms", "leave beta out"),
        ({"terms": [{"name": "gkd"}], "name": "jsd"}, "terms", "leave name out"),
        ({"terms": [{"name": "gkd"}], "cross_entropy_weight": 0.5}, "terms", "leave cross_entropy_weight out"),
        ({"terms": [{"name": "gkd", "weight": 0.0}]}, "weight", "greater than 0"),
        ({"name": "sft", "cross_entropy_weight": 0.5}, "", "twice"),
        ({"name": "gkd", "cross_entropy_weight": 0.5, "on_policy_fraction": 1.0}, "on_policy_fraction", "below 1"),
        (
            {"terms": [{"name": "gkd"}, {"name": "jsd", "sequences": "own"}], "on_policy_fraction": 0.0},
            "on_policy_fraction",
            "above 0",
        ),
        (
            {"terms": [{"name": "gkd", "sequences": "data"}], "on_policy_fraction": 0.5},
            "on_policy_fraction",
            "must be 0",
        ),
        (
            {"terms": [{"name": "forward_kl"}, {"name": "reverse_kl"}], "signal": "topk"},
            "signal",
            "reverse KL on the teacher's top-k",
        ),
    ],
)
def test_terms_that_make_no_objective_are_refused(values, field, advice):
    with pytest.raises(ValidationError, match=advice) as refused:
        ObjectiveConfig.model_validate(values)
    assert field in str(refused.value)


@pytest.mark.parametrize(
    ("values", "fraction", "signal", "label"),
    [
        ({"terms": [{"name": "forward_kl"}, {"name": "sft", "weight": 0.5}]}, 0.0, "hidden", "1 forward_kl + 0.5 sft"),
        ({"name": "gkd", "cross_entropy_weight": 0.25}, 0.5, "hidden", "0.75 gkd + 0.25 sft"),
        ({"terms": [{"name": "policy_gradient_kl"}]}, 1.0, "topk", "policy_gradient_kl"),
        ({"terms": [{"name": "policy_gradient_kl"}, {"name": "sft"}]}, 0.5, "topk", "1 policy_gradient_kl + 1 sft"),
        (
            {"terms": [{"name": "policy_gradient_kl"}, {"name": "reverse_kl", "sequences": "data"}]},
            0.5,
            "candidates",
            "1 policy_gradient_kl + 1 reverse_kl@data",
        ),
    ],
)
def test_what_terms_leave_out_is_filled_in_and_read_again(values, fraction, signal, label):
    config = ObjectiveConfig.model_validate(values)
    assert (config.on_policy_fraction, config.signal, config.label) == (fraction, signal, label)
    import yaml

    assert ObjectiveConfig.model_validate(yaml.safe_load(to_yaml(config))) == config


def test_importance_weights_and_terms_are_among_the_metrics_of_a_training(tiny_model, data, teacher, tmp_path):
    terms = [{"name": "policy_gradient_kl", "weight": 0.5}, {"name": "sft"}]
    objective = {"terms": terms, "importance_weights": True, "importance_clip": 1.5, "approximate": True}
    config = student_config(
        tiny_model, data, objective=objective, sampling={"temperature": 2.0, "max_new_tokens": 8, "max_staleness": 1}
    )
    train(config, folder=tmp_path, teacher=teacher)
    rows = metric_rows(tmp_path)
    own = [row for row in rows if row.get("train/own_sequences")]
    assert own
    assert all(0 < row["train/effective_share"] <= 1 for row in own)
    assert any(row["train/clipped_share"] > 0 for row in own)
    assert {"train/term/policy_gradient_kl", "train/term/sft", "train/importance_weight"} <= set().union(*rows)
    for row in rows[1:]:
        parts = 0.5 * row.get("train/term/policy_gradient_kl", 0.0) + row.get("train/term/sft", 0.0)
        assert row["train/loss"] == pytest.approx(parts, rel=1e-6)
    assert np.isfinite([row["train/loss"] for row in rows[1:]]).all()


def test_a_prompt_is_continued_as_often_as_is_said(tiny_model, data, teacher, tmp_path):
    config = student_config(
        tiny_model,
        data,
        objective={"name": "gkd", "on_policy_fraction": 0.5},
        batch={"sequences": 8, "micro_batch_sequences": 4, "max_tokens": 96},
        sampling={"completions": 4, "max_new_tokens": 4},
    )
    student = Student(tiny_model, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=512)
    batches = BatchBuilder(config, student, teacher, {None: unembedding_of(teacher.unembedding(), student.device)})
    from tutelage.trainer.data.dataset import read_dataset

    examples = read_dataset(data, student.tokenizer, template="chat", max_tokens=96).examples
    seen = set()
    for step in range(8):
        pair = examples[2 * step : 2 * step + 2]
        batches.prefetch(step, lambda _step, pair=pair: pair)
        sequences = [sequence for batch in batches.take(step) for sequence in batch.sequences]
        for example in pair:
            mine = [each for each in sequences if np.array_equal(each.ids[: each.prompt_tokens], example.prompt_ids)]
            own = [each for each in mine if each.is_own]
            assert (len(mine), len(own)) in {(1, 0), (4, 4)}
            seen.add(len(own))
            assert len({each.ids.tobytes() for each in own}) > 1 or not own
    batches.close()
    assert seen == {0, 4}


@pytest.mark.parametrize(
    ("changes", "field", "advice"),
    [
        ({"sampling": {"completions": 3}}, "sampling.completions", "do not divide"),
        ({"sampling": {"completions": 2}, "objective": {"name": "sft"}}, "sampling.completions", "writes none"),
        ({"sampling": {"completions": 2}, "on_policy_unit": "micro_batch"}, "on_policy_unit", "use sequence"),
        ({"sampling": {"rollout": "a.b:c"}, "objective": {"name": "sft"}}, "sampling.rollout", "which it does not"),
        ({"sampling": {"rollout": "a.b"}}, "sampling.rollout", "pattern"),
    ],
)
def test_completions_and_rollouts_that_cannot_be_are_refused(changes, field, advice, tiny_model, data):
    with pytest.raises(ValidationError, match=rf"(?s){field}.*{advice}"):
        student_config(tiny_model, data, **changes)
