"""A teacher that has the student's ids and some of its own: known by its tokenizer, left out of every distribution."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.errors import ConfigurationError, IdentityMismatch
from tutelage.identity import require_same_tokenizer, tokenizer_digests
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.teacher.rows import Unembedding
from tutelage.trainer.teacher.to_tensors import unembedding_of
from tutelage.trainer.training.loop import train


def extended(model: Path, folder: Path, tokens: list[str], rows: int = 0) -> Path:
    """The model with more added tokens, and a head that likes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    if rows:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        whole.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            whole.get_input_embeddings().weight[512:] = 2 * whole.get_input_embeddings().weight[20 : 20 + rows - 512]
        whole.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def larger(tiny_model, tmp_path_factory) -> Path:
    return extended(tiny_model, tmp_path_factory.mktemp("larger") / "teacher", ["<a>", "<b>", "<c>"], rows=515)


def test_ids_that_follow_the_students_are_accepted_and_no_others(tiny_model, larger, tmp_path):
    student, teacher = tokenizer_digests(tiny_model), tokenizer_digests(larger)
    require_same_tokenizer(teacher, student)
    with pytest.raises(IdentityMismatch, match="differ in added_tokens"):
        require_same_tokenizer(student, teacher)
    other = tokenizer_digests(extended(tiny_model, tmp_path / "other", ["<b>", "<a>", "<c>"]))
    with pytest.raises(IdentityMismatch, match="differ in added_tokens"):
        require_same_tokenizer(other, teacher)
    with pytest.raises(IdentityMismatch, match="differ in added_tokens, merges"):
        require_same_tokenizer(teacher | {"merges": "0"}, student)
    with pytest.raises(IdentityMismatch, match="differ in added_tokens"):  # a server that does not say
        require_same_tokenizer({key: value for key, value in teacher.items() if "." not in key}, student)


def test_their_mass_is_what_a_float64_softmax_over_everything_gives_them(larger):
    arrays = InProcessTeacher(larger).unembedding()
    head = unembedding_of(arrays, torch.device("cpu"), 512)
    assert head.vocabulary_size == 512
    hidden = torch.randn(7, head.matrix_VD.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    every = unembedding_of(arrays, torch.device("cpu")).logits(hidden).double().softmax(-1)
    expected = every[:, 512:].sum(-1)
    assert expected.max() > 1e-3
    assert torch.allclose(head.mass_beyond(hidden).double(), expected, rtol=1e-4, atol=1e-9)
    assert unembedding_of(arrays, torch.device("cpu"), 515).mass_beyond(hidden) is None
    assert isinstance(head.beyond, Unembedding)


def test_a_training_is_the_one_without_them_and_their_mass_is_a_metric(tiny_model, larger, tmp_path):
    prune_layers(tiny_model, tmp_path / "init", layers=2)
    data = write_rows(tmp_path / "rows.jsonl")
    objective = {"name": "reverse_kl", "signal": "hidden", "on_policy_fraction": 0, "noise": 0.5}
    config = student_config(tmp_path / "init", data, objective=objective, steps=2, save_every_steps=2)
    rows = {}
    for name, model in (("same", tiny_model), ("larger", larger)):
        train(config, folder=tmp_path / name, teacher=InProcessTeacher(model, torch.bfloat16))
        rows[name] = metric_rows(tmp_path / name)
    beyond = [row.pop("train/teacher_mass_beyond") for row in rows["larger"] if "train/loss" in row]
    assert len(beyond) == 2
    assert all(0 < mass < 1 for mass in beyond)
    assert rows["same"] == rows["larger"]


def test_signals_that_are_normalised_over_them_are_refused(tiny_model, larger, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    objective = {"name": "forward_kl", "signal": "topk", "on_policy_fraction": 0}
    config = student_config(tiny_model, data, objective=objective)
    with pytest.raises(ConfigurationError, match=r"topk, but the teacher has 3 ids that the student has not.*hidden"):
        train(config, folder=tmp_path / "run", teacher=InProcessTeacher(larger))
