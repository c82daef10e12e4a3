"""Many architectures as students: the loss sees what the model computes, or the student is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from architectures import ARCHITECTURES, REFUSED, WINDOW, write_architecture
from trainer_cases import student_config
from tutelage.errors import ConfigurationError
from tutelage.trainer.config.student import OptimizerConfig
from tutelage.trainer.data.sequences import TokenSequence, token_sequence
from tutelage.trainer.losses.losses import token_cross_entropy
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import open_sampler
from tutelage.trainer.teacher.to_tensors import targets_of


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


@pytest.mark.parametrize("name", ARCHITECTURES)
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


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"mamba", "mamba2"}))
def test_what_a_student_writes_is_what_it_would_write_of_each_prompt_alone(name, folders, tmp_path):
    """Greedily, beyond its window, in a batch of several lengths; against plain forward passes without a cache."""
    student = open_student(folders(name))
    sampling = {"max_new_tokens": 4, "temperature": 1e-4}
    config = student_config(folders(name), tmp_path / "rows.jsonl", objective={"name": "gkd"}, sampling=sampling)
    sampler = open_sampler(config, student)
    prompts = [sequence.ids for sequence in random_sequences(WINDOW - 3, 3 * WINDOW, WINDOW + 1)]
    completions = sampler.generate(0, range(3), prompts)
    student.model.eval()
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = prompt.tolist()
        for token in completion.tolist():
            with torch.no_grad():
                logits_V = student.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert logits_V.max() - logits_V[token] < 1e-3
            ids.append(token)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
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
