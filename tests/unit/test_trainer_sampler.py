"""Which sampler a student gets, what is refused, and what vLLM is told about each sequence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from trainer_cases import student_config
from tutelage.errors import ConfigurationError
from tutelage.runtime import vllm_api
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout import vllm_sampler
from tutelage.trainer.rollout.base import open_sampler
from tutelage.trainer.rollout.hf_sampler import TransformersSampler, sampling_seed
from tutelage.trainer.rollout.vllm_sampler import VllmSampler, request_settings

PROMPTS = [np.array(ids, np.int32) for ids in ([40, 41, 42, 43, 44], [50], [60, 61, 62])]
VLLM = {"engine": "vllm", "max_new_tokens": 12}


def config_of(model: Path, **changes: Any):
    return student_config(model, Path("rows.jsonl"), **changes)


@pytest.fixture(scope="module")
def student(tiny_model: Path) -> Student:
    config = config_of(tiny_model)
    return Student(tiny_model, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=512)


def test_the_trained_model_writes_unless_vllm_is_asked_for(student, tiny_model):
    assert isinstance(open_sampler(config_of(tiny_model), student), TransformersSampler)


def test_no_vllm_is_started_for_a_student_that_writes_nothing(student, tiny_model):
    config = config_of(tiny_model, sampling=VLLM, objective={"name": "forward_kl"})
    assert isinstance(open_sampler(config, student), TransformersSampler)


def test_what_vllm_cannot_do_exactly_is_refused_with_advice(tiny_model):
    cold = {"temperature": 0.001}
    assert config_of(tiny_model, sampling=cold).sampling.engine == "transformers"
    with pytest.raises((ValidationError, ConfigurationError), match="use transformers, or a higher one"):
        config_of(tiny_model, sampling={**VLLM, **cold})


def test_where_vllm_is_not_installed_it_says_so(student, tiny_model, monkeypatch):
    monkeypatch.setattr(vllm_api, "find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"sampling.engine: vllm is not installed") as refused:
        open_sampler(config_of(tiny_model, sampling=VLLM), student)
    assert refused.value.field == "sampling.engine"


def test_each_sequence_of_each_step_has_a_seed_of_its_own(tiny_model):
    def seed(step: int, batch_index: int, **changes: Any) -> int:
        config = config_of(tiny_model, **changes)
        return sampling_seed(config, step, batch_index, turn=0)

    batch_indices = [(step, batch_index) for step in range(8) for batch_index in range(8)]
    seeds = [seed(*batch_index) for batch_index in batch_indices]
    assert len(set(seeds)) == len(batch_indices)
    assert [seed(*batch_index) for batch_index in batch_indices] == seeds
    assert not set(seeds) & {seed(*batch_index, id="bob") for batch_index in batch_indices}
    assert not set(seeds) & {seed(*batch_index, seed=1) for batch_index in batch_indices}


def test_vllm_is_told_the_room_the_end_and_the_vocabulary(student, tiny_model):
    config = config_of(tiny_model, sampling={"temperature": 0.7, "top_p": 0.9})
    settings = request_settings(config, student, seed=7, prompt_tokens=5)
    assert (settings["max_tokens"], settings["temperature"], settings["top_p"]) == (12, 0.7, 0.9)
    assert settings["stop_token_ids"] == sorted(student.end_ids)
    assert settings["allowed_token_ids"] is None
    assert request_settings(config, student, seed=7, prompt_tokens=90)["max_tokens"] == 6


def test_padded_rows_of_the_head_are_no_choice(tiny_model):
    config = config_of(tiny_model)
    padded = Student(tiny_model, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=500)
    settings = request_settings(config, padded, seed=7, prompt_tokens=5)
    assert settings["allowed_token_ids"] == list(range(500))


class Weights:
    """An engine that only takes weights."""

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        self.taken = dict(kwargs["weights_iterator"])


@pytest.fixture
def engine(monkeypatch) -> Weights:
    engine = Weights()
    monkeypatch.setattr(vllm_sampler, "_start", lambda *_: engine)
    return engine


def finding(monkeypatch, student: Student, token: int, error_nats: float) -> None:
    """Lets the engine find a token as likely as the student does, but for an error."""
    logp = float(vllm_sampler.canary(student.model, student.vocabulary_size)[token]) + error_nats
    output = SimpleNamespace(logprobs=[{token: SimpleNamespace(logprob=logp)}])
    monkeypatch.setattr(VllmSampler, "_generate", lambda *_: [(0, output)])


def test_the_engine_is_given_the_present_weights_by_reference_and_tied_ones_under_each_name(
    student, tiny_model, engine, monkeypatch
):
    finding(monkeypatch, student, token=7, error_nats=0.1)
    open_sampler(config_of(tiny_model, sampling=VLLM), student)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert engine.taken[name].data_ptr() == student.model.lm_head.weight.data_ptr()
    assert {name for name, _ in student.model.named_parameters()} <= set(engine.taken)


@pytest.mark.usefixtures("engine")
def test_an_engine_that_computes_something_else_is_refused_at_start(student, tiny_model, monkeypatch):
    finding(monkeypatch, student, token=7, error_nats=-0.8)
    with pytest.raises(ConfigurationError, match=r"are 0\.80 from the student's.*use transformers"):
        open_sampler(config_of(tiny_model, sampling=VLLM), student)


def test_the_same_step_draws_the_same_and_another_step_other_samples(student, tiny_model):
    sampler = TransformersSampler(config_of(tiny_model), student)
    one, two, other = (sampler.write(step, range(3), PROMPTS).result() for step in (3, 3, 4))
    assert all(np.array_equal(left.ids, right.ids) for left, right in zip(one, two, strict=True))
    assert any(not np.array_equal(left.ids, right.ids) for left, right in zip(one, other, strict=True))
    assert student.model.training


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8)])
def test_what_was_drawn_comes_with_the_probability_that_it_was_drawn_with(temperature, top_p, student, tiny_model):
    """Against plain passes; within a nucleus probabilities are those that are left, normalised."""
    config = config_of(tiny_model, dtype="float32", sampling={"temperature": temperature, "top_p": top_p})
    exact = Student(tiny_model, dtype="float32", optimizer=config.optimizer, vocabulary_size=512)
    for prompt, completion in zip(
        PROMPTS, TransformersSampler(config, exact).write(0, range(3), PROMPTS).result(), strict=True
    ):
        ids = torch.from_numpy(np.concatenate([prompt, completion.ids])).long()
        with torch.no_grad():
            logits_TV = exact.model(ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
        p_TV = logits_TV.softmax(-1)
        sorted_TV, order_TV = p_TV.sort(-1, descending=True)
        kept_TV = (sorted_TV.cumsum(-1) - sorted_TV < top_p).scatter(
            -1, order_TV, sorted_TV.cumsum(-1) - sorted_TV < top_p
        )
        p_TV = p_TV * kept_TV / (p_TV * kept_TV).sum(-1, keepdim=True)
        expected_T = p_TV.gather(-1, ids[len(prompt) :, None])[:, 0].log().numpy()
        assert completion.logp.dtype == np.float32
        np.testing.assert_allclose(completion.logp, expected_T, atol=1e-4)


def test_a_repetition_penalty_is_transformers_own(tiny_model):
    """Greedily, against `generate`, which reads the same penalty from its own configuration."""
    config = config_of(tiny_model, dtype="float32", sampling={"temperature": 1e-3, "repetition_penalty": 1.4})
    exact = Student(tiny_model, dtype="float32", optimizer=config.optimizer, vocabulary_size=512)
    written = TransformersSampler(config, exact).write(0, range(3), PROMPTS).result()
    for prompt, completion in zip(PROMPTS, written, strict=True):
        ids = torch.from_numpy(prompt).long()[None]
        theirs = exact.model.generate(
            ids, do_sample=False, repetition_penalty=1.4, max_new_tokens=12, eos_token_id=sorted(exact.end_ids)
        )[0, len(prompt) :]
        assert completion.ids.tolist() == theirs.tolist()


def test_what_a_checkpoint_says_about_sampling_is_not_followed_and_that_is_said(student, tiny_model, caplog):
    student.model.generation_config.repetition_penalty = 1.3
    student.model.generation_config.temperature = 0.6
    try:
        sampler = open_sampler(config_of(tiny_model), student)
    finally:
        student.model.generation_config.repetition_penalty = student.model.generation_config.temperature = None
    assert "temperature 0.6, repetition_penalty 1.3, which no sample follows" in caplog.text
    caplog.clear()
    open_sampler(config_of(tiny_model), student)
    open_sampler(config_of(tiny_model, objective={"name": "sft"}), student)
    assert "no sample follows" not in caplog.text
    assert sampler.write(0, [0], PROMPTS[:1]).result()
