"""Every kind of head, as a tiny random model of its architecture: ours makes the model's logits, or is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fake_teacher import FakeScoringEngine, fake_head
from tutelage.errors import NotServed
from tutelage.teacher_server.model import head_check, self_check
from tutelage.teacher_server.model.head_check import OwnModel, check_head
from tutelage.teacher_server.signals import unembedding
from tutelage.teacher_server.signals.logit_head import SignalHead

VOCABULARY, PADDED, WIDTH = 60, 64, 32
TEXT = list(range(5, 29))
SIZES = {
    "vocab_size": PADDED,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}
GPT_SIZES = {"vocab_size": PADDED, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
    "eos_token_id": 0}  # fmt: skip
HEADS = {
    "llama, tied": ("LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "llama, untied": ("LlamaConfig", SIZES | {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", SIZES | {"tie_word_embeddings": True}),
    "phi, biased": ("PhiConfig", SIZES | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", GPT_SIZES),
    "gpt_neox": ("GPTNeoXConfig", SIZES | {"tie_word_embeddings": False}),
    "gemma": ("GemmaConfig", SIZES),
    "gemma2, softcap": ("Gemma2Config", SIZES | {"final_logit_softcapping": 30.0}),
    "gemma3_text": ("Gemma3TextConfig", SIZES),
    "cohere, scale": ("CohereConfig", SIZES | {"logit_scale": 0.0625}),
    "cohere2, scale": ("Cohere2Config", SIZES | {"logit_scale": 0.25}),
    "granite, scale": ("GraniteConfig", SIZES | {"logits_scaling": 8.0}),
    "olmo2": ("Olmo2Config", SIZES),
    "mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 2}),
    "smollm3": ("SmolLM3Config", SIZES),
}


@pytest.fixture
def checkpoint(request, tmp_path):
    """A random model of one of `HEADS`, on disk; its bias is not zero, as it is when a model is made."""
    import transformers
    from transformers import AutoModelForCausalLM

    name, values = HEADS[request.param]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**values))
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def head_of(folder, **wrong) -> SignalHead:
    return SignalHead(replace(unembedding.load(folder, VOCABULARY), **wrong), device="cpu")


@pytest.mark.parametrize("checkpoint", HEADS, indirect=True)
def test_a_known_head_makes_the_models_own_logits(checkpoint):
    head = head_of(checkpoint)
    own_logits = check_head(checkpoint, head, TEXT)
    assert own_logits is not None
    assert own_logits.shape == (len(TEXT), VOCABULARY)
    states = OwnModel(checkpoint, VOCABULARY, whole=True)._model.base_model(torch.tensor([TEXT])).last_hidden_state[0]
    torch.testing.assert_close(head.logits(states), own_logits, rtol=0.02, atol=0.02 * float(own_logits.abs().max()))


@pytest.mark.parametrize(
    ("checkpoint", "wrong", "missing"),
    [
        ("gemma2, softcap", {"softcap": 0.0}, r"softcap .*theirs 30.0, ours None"),
        ("llama, tied", {"softcap": 50.0}, r"softcap .*theirs None, ours 50.0"),
        ("cohere, scale", {"scale": 1.0}, r"factor of 0.062"),
        ("granite, scale", {"scale": 1.0}, r"factor of 0.125"),
        ("phi, biased", {"bias_V": None}, r"a bias on the logits .*ours 0\)"),
        ("llama, untied", {"weight_VD": torch.randn(VOCABULARY, WIDTH)}, r"the matrix itself"),
    ],
    indirect=["checkpoint"],
)
def test_a_head_without_a_transform_is_refused_and_the_transform_named(checkpoint, wrong, missing):
    with pytest.raises(NotServed, match=missing):
        check_head(checkpoint, head_of(checkpoint, **wrong), TEXT)


@pytest.mark.parametrize("checkpoint", HEADS, indirect=True)
def test_a_model_that_does_not_fit_beside_the_engine_has_its_head_checked_all_the_same(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1))
    assert check_head(checkpoint, head_of(checkpoint), TEXT) is None
    assert "only its head was checked" in caplog.text
    with pytest.raises(NotServed, match="likely missing"):
        check_head(checkpoint, head_of(checkpoint, weight_VD=2 * head_of(checkpoint).unembedding.weight_VD), TEXT)


def test_the_engines_states_are_compared_with_the_models_own_logits():
    engine, head = FakeScoringEngine(), fake_head()
    scoring = SimpleNamespace(engine=engine, head=head)
    own = head.logits(asyncio.run(engine.hidden_states([1, 2, 3])))
    assert asyncio.run(self_check.check_states(scoring, [1, 2, 3], own)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(NotServed, match="other distributions than the model's own"):
        asyncio.run(self_check.check_states(scoring, [1, 2, 3], own.flip(0)))
    with pytest.raises(NotServed, match="KL nan"):
        asyncio.run(self_check.check_states(scoring, [1, 2, 3], own * torch.nan))


def test_the_tolerance_is_above_what_bfloat16_rounds_and_below_any_transform():
    head = fake_head()
    rounded = head_check.require_same_logits(lambda states: head.logits(states).bfloat16().float(), head.logits, 16)
    assert rounded is None
    with pytest.raises(NotServed, match=r"factor of 0.9"):
        head_check.require_same_logits(lambda states: 0.9 * head.logits(states), head.logits, 16)
