"""Many architectures as students: the loss sees what the model computes, or the student is refused by name.

One or more of each kind; the others of a kind are in the long form.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from architectures import ARCHITECTURES, REFUSED, WINDOW, write_architecture
from trainer_cases import metric_rows, student_config, write_rows
from tutelage.errors import ConfigurationError
from tutelage.trainer.config.student import OptimizerConfig
from tutelage.trainer.data.sequences import TokenSequence, token_sequence
from tutelage.trainer.losses.losses import token_cross_entropy
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import open_sampler
from tutelage.trainer.teacher.to_tensors import targets_of
from tutelage.trainer.training.loop import train

OF_EACH_KIND = (
    "llama", "mistral", "phi, a bias", "gpt2", "gemma2, softcap", "gemma4, nested", "cohere, scale", "qwen3_moe",
    "gpt_oss", "deepseek_v3", "bloom", "qwen3_next", "mamba", "llama4_text",
)  # fmt: skip
RECURRENT = ("mamba", "mamba2")  # they do not compute token by token what they compute at once


def cases(names: Iterable[str]) -> list[Any]:
    return [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long) for name in names]


def open_student(folder: Path, **changes: Any) -> Student:
    settings = {"dtype": "float32", "optimizer": OptimizerConfig(), "vocabulary_size": 512}
    return Student(folder, **(settings | changes))


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory):
    """Checkpoints by architecture, each written once."""
    root = tmp_path_factory.mktemp("architectures")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            write_architecture(root / name, tiny_model, *ARCHITECTURES[name])
        return root / name

    return folder


def random_sequences(*lengths: int) -> list[TokenSequence]:
    generator = np.random.default_rng(1)
    ids = [generator.integers(3, 500, length).astype(np.int32) for length in lengths]
    return [token_sequence(each[:1], each[1:], loss_on_prompt=True) for each in ids]


@pytest.mark.parametrize("name", cases(ARCHITECTURES))
def test_the_first_loss_is_the_models_own_beside_and_beyond_a_window(name, folders):
    from transformers import AutoModelForCausalLM

    student = open_student(folders(name))
    student.model.eval()
    own = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.float32).eval()
    sequences = random_sequences(WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW)
    with torch.no_grad():
        hidden_ND = student.hidden(sequences)
        loss_N = token_cross_entropy(hidden_ND, student.head(), targets_of(sequences))
    for sequence, losses in zip(sequences, loss_N.split([each.rows for each in sequences]), strict=True):
        ids = torch.from_numpy(sequence.ids).long()[None]
        expected = own(input_ids=ids, labels=ids).loss.item()
        assert losses.mean().item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "gemma4, nested", "cohere, scale", "qwen3_moe"])
def test_rounding_to_bfloat16_is_no_difference(name, folders, tmp_path):
    student = open_student(folders(name), dtype="bfloat16")
    open_sampler(student_config(folders(name), tmp_path, objective={"name": "gkd"}, dtype="bfloat16"), student)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loss_would_not_see_is_refused_by_name(name, tiny_model, tmp_path):
    config_class, settings, problem = REFUSED[name]
    folder = write_architecture(tmp_path / "model", tiny_model, config_class, settings)
    with pytest.raises(ConfigurationError, match=problem) as refusal:
        open_student(folder)
    assert refusal.value.field == "init"


@pytest.mark.parametrize("name", cases(sorted(ARCHITECTURES.keys() - {*RECURRENT})))
def test_what_a_student_writes_is_what_it_would_write_of_each_prompt_alone(name, folders, tmp_path):
    """Greedily, beyond its window, in a batch of several lengths; against plain forward passes without a cache."""
    student = open_student(folders(name))
    sampling = {"max_new_tokens": 4, "temperature": 1e-4}
    config = student_config(folders(name), tmp_path / "rows.jsonl", objective={"name": "gkd"}, sampling=sampling)
    sampler = open_sampler(config, student)
    prompts = [sequence.ids for sequence in random_sequences(WINDOW - 3, 3 * WINDOW, WINDOW + 1)]
    completions = sampler.write(0, range(3), prompts).result()
    student.model.eval()
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = prompt.tolist()
        for token in completion.ids.tolist():
            with torch.no_grad():
                logits_V = student.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert logits_V.max() - logits_V[token] < 1e-3
            ids.append(token)


@pytest.mark.parametrize("name", cases(RECURRENT))
def test_a_model_that_computes_otherwise_token_by_token_is_refused_where_it_would_write(name, folders, tmp_path):
    student = open_student(folders(name))
    with pytest.raises(ConfigurationError, match="does not compute token by token what it computes at once") as refusal:
        open_sampler(student_config(folders(name), tmp_path, objective={"name": "gkd"}), student)
    assert refusal.value.field == "objective.on_policy_fraction"
    open_sampler(student_config(folders(name), tmp_path, objective={"name": "forward_kl"}), student)


def test_a_cache_that_cannot_be_cut_is_a_refusal_and_no_traceback(folders, tmp_path, monkeypatch):
    def uncut(*_arguments, **_settings):
        raise AttributeError("'NoneType' object has no attribute 'batch_select_indices'")

    monkeypatch.setattr("tutelage.trainer.rollout.hf_sampler.decode", uncut)
    with pytest.raises(ConfigurationError, match=r"AttributeError: .*batch_select_indices"):
        open_sampler(
            student_config(folders("llama"), tmp_path, objective={"name": "gkd"}), open_student(folders("llama"))
        )


@pytest.mark.parametrize("name", cases(("olmoe", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe")))
def test_the_routers_loss_is_the_models_own_and_reaches_the_router(name, tiny_model, tmp_path):
    class_name, settings = ARCHITECTURES[name]
    routed = settings | {"output_router_logits": True, "router_aux_loss_coef": 0.25}
    folder = write_architecture(tmp_path / "model", tiny_model, class_name, routed)
    student = open_student(folder, router_loss=True)
    sequences = random_sequences(9, 23, 16)
    _, loss = student.hidden_and_router_loss(sequences)
    width = max(len(sequence.ids) for sequence in sequences)
    ids_BT = torch.zeros(3, width, dtype=torch.long)
    mask_BT = torch.zeros(3, width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence.ids)] = torch.from_numpy(sequence.ids)
        mask_BT[row, : len(sequence.ids)] = 1
    theirs = student.model(input_ids=ids_BT, attention_mask=mask_BT, output_router_logits=True).aux_loss
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    loss.backward()
    gates = {key: each for key, each in student.model.named_parameters() if ".gate" in key or "router" in key}
    assert any(each.grad is not None and each.grad.any() for each in gates.values())
    hidden_ND, _ = student.hidden_and_router_loss(sequences)
    torch.testing.assert_close(hidden_ND, student.hidden(sequences))


def test_a_routers_loss_of_a_model_without_experts_is_refused(folders):
    with pytest.raises(ConfigurationError, match="has no load-balancing loss") as refusal:
        open_student(folders("llama"), router_loss=True)
    assert refusal.value.field == "router_loss_weight"


def test_the_routers_loss_of_a_step_is_weighed_by_tokens(tiny_model, tmp_path):
    """Of one micro-batch: the model's own; and the loss is the objective's and the weighted router's."""
    class_name, settings = ARCHITECTURES["qwen3_moe"]
    folder = write_architecture(tmp_path / "model", tiny_model, class_name, settings)
    shutil.copy(tiny_model / "chat_template.jinja", folder)
    path, rows = write_rows(tmp_path / "rows.jsonl"), {}
    for weight in (0.0, 0.5):
        config = student_config(
            folder,
            path,
            objective={"name": "sft"},
            dtype="float32",
            router_loss_weight=weight,
            steps=1,
        )
        train(config, folder=tmp_path / str(weight), teacher=None)
        rows[weight] = metric_rows(tmp_path / str(weight))[1]
    assert "train/router_loss" not in rows[0.0]
    router = rows[0.5]["train/router_loss"]
    assert 0.5 < router < 8.0
    assert rows[0.5]["train/loss"] == pytest.approx(rows[0.0]["train/loss"] + 0.5 * router, rel=1e-5)
