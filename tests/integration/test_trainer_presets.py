"""A step of the loop under a preset is what the authors' released code computes on the same batch.

The references are written from the released formulas on padded [B, T, V] logits of transformers models: softmax at
T on both sides, sums over the vocabulary, masks of all tokens that are no padding, then the means.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from trainer_cases import student_config
from trainer_doubles import InProcessTeacher
from tutelage.config import to_yaml, validate
from tutelage.errors import ConfigurationError
from tutelage.trainer.config.presets import PRESETS, RECIPES
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.dataset import TokenizedExample
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.to_tensors import unembedding_of
from tutelage.trainer.training.batch_builder import BatchBuilder
from tutelage.trainer.training.step import TrainStep

LENGTHS = [(3, 9), (5, 2), (4, 14), (2, 5)]
"""Tokens of prompt and completion; two micro-batches of very different lengths."""


@pytest.fixture(scope="module")
def teacher(tiny_model: Path) -> InProcessTeacher:
    return InProcessTeacher(tiny_model)


@pytest.fixture(scope="module")
def init(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    prune_layers(tiny_model, folder, layers=2)
    return folder


@pytest.fixture(scope="module")
def examples() -> list[TokenizedExample]:
    generator = np.random.default_rng(0)
    return [TokenizedExample(*(generator.integers(3, 500, size).astype(np.int32) for size in pair)) for pair in LENGTHS]


def one_step(config: StudentConfig, teacher: InProcessTeacher, examples: list[TokenizedExample]) -> dict[str, float]:
    student = Student(config.init, dtype="float32", optimizer=config.optimizer, vocabulary_size=512)
    batches = BatchBuilder(config, student, teacher, {None: unembedding_of(teacher.unembedding(), student.device)})
    train_step = TrainStep(config, student, batches)
    return train_step.train_step(0, lambda _step: examples, lambda phase: None)


def padded(init: Path, teacher: InProcessTeacher, examples: list[TokenizedExample]):
    """Student's model and logits, teacher's logits [B, T, V], mask [B, T]."""
    sequences = [np.concatenate([item.prompt_ids, item.completion_ids]) for item in examples]
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    teacher_logits = torch.zeros(len(sequences), longest, 512)
    mask = torch.zeros(len(sequences), longest)
    matrix = torch.from_numpy(teacher.unembedding().rows_VD).view(torch.bfloat16)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = torch.from_numpy(sequence), 1.0
        signals = teacher.signals(TokenSequence(sequence, 0, len(sequence)), SignalSpec("hidden"))
        hidden = torch.from_numpy(signals["hidden_RD"]).view(torch.bfloat16)
        teacher_logits[row, : len(sequence)] = hidden.float() @ matrix.float().T
    model = AutoModelForCausalLM.from_pretrained(init, dtype=torch.float32)
    return model, model(ids, attention_mask=mask.long()).logits, teacher_logits, mask


def released_kd(student, teacher, mask, temperature, *, reverse):
    log_q = (student / temperature).log_softmax(-1)
    if reverse:
        token = (log_q.exp() + 1e-9) * (log_q - (teacher / temperature).log_softmax(-1))
    else:
        p = (teacher / temperature).softmax(-1) + 1e-9
        token = p * (p.log() - log_q)
    return ((token.sum(-1) * mask).sum(-1) / mask.sum(-1)).mean() * temperature**2


def released_gkd(student, teacher, mask):
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = 0.5 * q + 0.5 * p
    token = 0.5 * (p * (p / m).log()).sum(-1) + 0.5 * (q * (q / m).log()).sum(-1)
    halves = [(token[part] * mask[part]).sum() / mask[part].sum() for part in (slice(0, 2), slice(2, 4))]
    return sum(halves) / 2


@pytest.mark.parametrize(
    ("preset", "temperature"), [("seq_kd", 1.0), ("seq_kd", 2.0), ("rev_kd", 2.0), ("rev_kd", 5.0), ("gkd", 1.0)]
)
def test_a_step_equals_the_released_code(preset, temperature, teacher, init, examples, tmp_path):
    config = student_config(
        init,
        tmp_path,
        dtype="float32",
        preset=f"paper_code/{preset}",
        objective={"temperature": temperature, "on_policy_fraction": 0.0},
    )
    model, student_logits, teacher_logits, mask = padded(init, teacher, examples)
    if preset == "gkd":
        expected = released_gkd(student_logits, teacher_logits, mask)
    else:
        expected = released_kd(student_logits, teacher_logits, mask, temperature, reverse=preset == "rev_kd")
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    found = one_step(config, teacher, examples)
    assert found["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["train/gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert found["train/tokens"] == sum(map(sum, LENGTHS))


def test_printed_objectives_look_at_completions_and_weigh_tokens_alike(teacher, init, examples, tmp_path):
    config = student_config(init, tmp_path, dtype="float32", preset="paper_text/rev_kd")
    _, student_logits, teacher_logits, mask = padded(init, teacher, examples)
    for row, (prompt, completion) in enumerate(LENGTHS):
        mask[row, : prompt - 1] = 0.0
        mask[row, prompt + completion - 1 :] = 0.0
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    expected = ((q.exp() * (q - p)).sum(-1) * mask).sum() / mask.sum()
    assert one_step(config, teacher, examples)["train/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_micro_batches_are_drawn_as_a_whole(teacher, init, examples, tmp_path):
    config = student_config(
        init,
        tmp_path,
        preset="paper_code/gkd",
        batch={"sequences": 12, "micro_batch_sequences": 4},
        sampling={"max_new_tokens": 2},
    )
    student = Student(config.init, dtype="float32", optimizer=config.optimizer, vocabulary_size=512)
    batches = BatchBuilder(config, student, teacher, {None: unembedding_of(teacher.unembedding(), student.device)})
    train_step = TrainStep(config, student, batches)
    own = [
        train_step.train_step(step, lambda _step: examples * 3, lambda phase: None)["train/own_sequences"]
        for step in range(6)
    ]
    assert {count % 4 for count in own} == {0}
    assert len(set(own)) > 1


def test_what_is_said_beside_a_preset_lies_over_it_and_a_recipe_goes_with_an_objective():
    base = {"defaults": {"init": "s", "data": {"path": "d.jsonl"}}}
    both = ["paper_recipe/math", "paper_code/rev_kd"]
    cohort = base | {
        "students": [
            {"id": "ann", "preset": both},
            {"id": "bob", "preset": both, "optimizer": {"learning_rate": 1e-3}, "objective": {"temperature": 2.0}},
            {"id": "cas", "preset": "paper_recipe/commonsense", "lora": None, "objective": {"name": "sft"}},
            {"id": "dan", "preset": ["paper_recipe/math", "paper_text/gkd"]},
        ]
    }
    ann, bob, cas, dan = validate(CohortConfig, cohort).students
    assert (ann.objective.name, ann.reduction, ann.loss_on_last_token) == (
        "paper_code/reverse_kl",
        "sequence_mean",
        True,
    )
    assert (ann.lora.r, ann.lora.lora_alpha, ann.lora.lora_dropout) == (8, 16.0, 0.05)
    assert ann.lora.target_modules == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert (ann.optimizer.learning_rate, ann.optimizer.warmup_steps) == (3e-4, 100)
    assert ann.optimizer.lr_scheduler_type == "linear"
    assert (ann.batch.sequences, ann.batch.micro_batch_sequences, ann.batch.max_tokens) == (16, 4, 256)
    assert ann.data.template == "alpaca_leaked_indentation_training"
    assert (ann.epochs, ann.seed, ann.keep_checkpoints) == (4, 6, 3)
    assert (ann.best.metric, ann.held_out.sequences, ann.held_out.every_steps) == ("heldout/cross_entropy", 500, 200)
    assert (bob.optimizer.learning_rate, bob.optimizer.warmup_steps) == (1e-3, 100)
    assert (bob.objective.name, bob.objective.temperature) == ("paper_code/reverse_kl", 2.0)
    assert (cas.epochs, cas.lora, cas.objective.name) == (3, None, "sft")
    assert (dan.loss_on_prompt, dan.loss_on_last_token) == (False, False)
    # The resolved configuration is the same configuration.
    assert StudentConfig.model_validate(json.loads(bob.model_dump_json())) == bob


def test_presets_in_defaults_reach_the_students():
    defaults = {"init": "s", "data": {"path": "d.jsonl"}, "preset": ["paper_recipe/math", "paper_code/gkd"]}
    students = [
        {"id": "ann"},
        {"id": "bob", "objective": {"name": "forward_kl"}},
        {"id": "cas", "preset": "paper_code/seq_kd"},
    ]
    config = validate(CohortConfig, {"defaults": defaults, "students": students})
    ann, bob, cas = config.students
    assert (ann.objective.name, ann.on_policy_unit) == ("paper_code/gkd", "micro_batch")
    assert (bob.objective.name, bob.objective.beta, bob.lora.r) == ("forward_kl", None, 8)
    assert (cas.objective.name, cas.reduction, cas.lora.r) == ("paper_code/forward_kl", "sequence_mean", 8)
    assert validate(CohortConfig, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("name", [*PRESETS, *RECIPES])
def test_every_preset_is_a_valid_configuration(name):
    students = [{"id": "ann", "init": "s", "data": {"path": "d.jsonl"}, "preset": name}]
    assert validate(CohortConfig, {"students": students}).students[0].preset == name


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"preset": "paper_code/seqkd"}, "did you mean paper_code/seq_kd"),
        ({"objective": {"name": "sft"}, "loss_on_last_token": True}, "signal: hidden"),
        (
            {"objective": {"name": "policy_gradient_kl", "signal": "hidden"}, "loss_on_last_token": True},
            "leave this out",
        ),
        ({"reduction": "mean"}, "token_mean"),
    ],
)
def test_refusals_say_what_to_do(values, advice):
    student = {"id": "ann", "init": "s", "data": {"path": "d.jsonl"}} | values
    with pytest.raises(ConfigurationError, match=advice):
        validate(CohortConfig, {"students": [student]})
