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
from tutelage.teacher_server.model.head_check import check_head, load_unembedding
from tutelage.teacher_server.model.own_model import OwnHead
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
LATENT = {
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
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
    "recurrent_gemma, softcap by another name": (
        "RecurrentGemmaConfig",
        SIZES | {"num_hidden_layers": 3, "logits_soft_cap": 5.0},
    ),
    "opt, a body in a body": ("OPTConfig", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "deepseek_v3": ("DeepseekV3Config", SIZES | LATENT),
    "gpt_oss": ("GptOssConfig", SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "nemotron": ("NemotronConfig", SIZES),
    "bloom, embeddings by another name": (
        "BloomConfig",
        {"vocab_size": PADDED, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    ),
    "lfm2, a hybrid": ("Lfm2Config", SIZES | {"layer_types": ["conv", "full_attention"]}),
    "mamba2": (
        "Mamba2Config",
        {"vocab_size": PADDED, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}
        | {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "gemma3, a text tower": ("Gemma3Config", {"text_config": SIZES, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "llama4_text": ("Llama4TextConfig", SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 48}),
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
    return SignalHead(replace(load_unembedding(folder, VOCABULARY), **wrong), device="cpu")


@pytest.mark.parametrize("checkpoint", HEADS, indirect=True)
def test_a_head_makes_the_models_own_logits(checkpoint):
    from transformers import AutoModelForCausalLM

    head = head_of(checkpoint)
    own_logits = check_head(checkpoint, head, TEXT)
    assert own_logits is not None
    assert own_logits.shape == (len(TEXT), VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        states, logits = (
            getattr(model, "model", model.base_model)(torch.tensor([TEXT])).last_hidden_state[0],
            model(torch.tensor([TEXT])).logits[0],
        )
    torch.testing.assert_close(head.logits(states), logits[:, :VOCABULARY], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits[:, :VOCABULARY], own_logits, rtol=0.05, atol=0.05 * float(own_logits.abs().max()))


@pytest.mark.parametrize(
    ("checkpoint", "scale", "softcap"),
    [
        ("llama, tied", 1.0, 0.0),
        ("gemma2, softcap", 1.0, 30.0),
        ("cohere, scale", 0.0625, 0.0),
        ("granite, scale", 0.125, 0.0),
        ("recurrent_gemma, softcap by another name", 1.0, 5.0),
        ("phi, biased", 1.0, 0.0),
    ],
    indirect=["checkpoint"],
)
def test_scale_and_softcap_are_found_in_the_models_code_exactly(checkpoint, scale, softcap):
    found = load_unembedding(checkpoint, VOCABULARY)
    assert (found.scale, found.softcap) == (scale, softcap)


@pytest.mark.parametrize(
    ("checkpoint", "wrong", "missing"),
    [
        ("gemma2, softcap", {"softcap": 0.0}, r"softcap .*theirs 30.0, ours None"),
        ("llama, tied", {"softcap": 50.0}, r"softcap .*theirs None, ours 50.0"),
        ("cohere, scale", {"scale": 1.0}, r"factor of 0.062"),
        ("granite, scale", {"scale": 1.0}, r"factor of 0.125"),
        ("phi, biased", {"bias_V": None}, r"a bias on the logits .*ours 0\)"),
        ("llama, untied", {"weight_VD": torch.randn(VOCABULARY, WIDTH)}, rf"{VOCABULARY} of {VOCABULARY} ids"),
    ],
    indirect=["checkpoint"],
)
def test_a_head_without_a_transform_is_refused_and_the_transform_named(checkpoint, wrong, missing):
    right = load_unembedding(checkpoint, VOCABULARY)
    with pytest.raises(NotServed, match=missing):
        head_check.require_same_logits(right.logits, replace(right, **wrong).logits, WIDTH)


@pytest.mark.parametrize(
    ("more", "differs"),
    [
        (lambda logits: logits.index_fill(1, torch.tensor([7, 9]), -1e9), r"2 of 60 ids \(the first is 7\)|a bias"),
        (lambda logits: logits - logits.mean(dim=1, keepdim=True), "60 of 60 ids"),
        (lambda logits: logits.relu(), "of 60 ids"),
        (lambda logits: logits.clamp(-5, 5), "60 of 60 ids|of 60 ids"),
    ],
    ids=["ids masked", "centred", "relu", "clamped"],
)
@pytest.mark.parametrize("checkpoint", ["llama, tied"], indirect=True)
def test_a_model_whose_code_does_more_is_refused_with_what_differs(checkpoint, more, differs, monkeypatch):
    class More(OwnHead):
        def logits(self, hidden_RD):
            return more(super().logits(hidden_RD))

    monkeypatch.setattr(head_check, "OwnHead", More)
    with pytest.raises(NotServed, match=differs):
        load_unembedding(checkpoint, VOCABULARY)


@pytest.mark.parametrize("checkpoint", HEADS, indirect=True)
def test_a_model_that_does_not_fit_beside_the_engine_has_its_head_checked_all_the_same(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1))
    assert check_head(checkpoint, head_of(checkpoint), TEXT) is None
    assert "only its head was checked" in caplog.text


def test_the_engines_states_are_compared_with_the_models_own_logits():
    engine, head = FakeScoringEngine(), fake_head()
    scoring = SimpleNamespace(engine=engine, head=head)
    own = head.logits(asyncio.run(engine.hidden_states([1, 2, 3])).states_RD)
    assert asyncio.run(self_check.check_states(scoring, [1, 2, 3], own)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(NotServed, match="other distributions than the model's own"):
        asyncio.run(self_check.check_states(scoring, [1, 2, 3], own.flip(0)))
    # Distributions that are nearly flat are near to all others, by their KL.
    flat = SimpleNamespace(engine=engine, head=SimpleNamespace(logits=lambda states: 0.01 * head.logits(states)))
    with pytest.raises(NotServed, match=r"KL 0\.\d+ nats a token, .* logits apart by 0\.87 of their size"):
        asyncio.run(self_check.check_states(flat, [1, 2, 3], 0.01 * own.flip(0)))
    with pytest.raises(NotServed, match="KL nan"):
        asyncio.run(self_check.check_states(scoring, [1, 2, 3], own * torch.nan))


def test_an_engine_that_cannot_go_on_from_what_it_cached_is_refused():
    class Forgets(FakeScoringEngine):
        """What it computes after a cached prefix knows nothing of it."""

        async def hidden_states(self, token_ids, first=0, salt=""):
            made = await super().hidden_states(token_ids, first, salt)
            return replace(made, states_RD=self.embeddings[list(token_ids[made.start :])].cumsum(0))

    def check(engine):
        asyncio.run(self_check.check_reuse(SimpleNamespace(engine=engine, head=fake_head()), list(range(70))))

    check(FakeScoringEngine(block_tokens=32))
    check(Forgets())  # which reuses nothing
    with pytest.raises(NotServed, match=r"enable_prefix_caching: a text whose first 64 tokens are cached"):
        check(Forgets(block_tokens=32))


def test_an_engine_that_goes_wrong_where_it_computes_a_text_in_parts_is_refused():
    class Splits(FakeScoringEngine):
        """What does not fit into a batch any more is computed in two parts, the second without the first."""

        given = 0

        async def hidden_states(self, token_ids, first=0, salt=""):
            before, self.given = self.given, self.given + len(token_ids)
            made = await super().hidden_states(token_ids, first, salt)
            cut = self.batch_tokens - before % self.batch_tokens
            if cut >= len(token_ids):
                return made
            rest = self.embeddings[list(token_ids[cut:])].cumsum(0)
            return replace(made, states_RD=torch.cat([made.states_RD[:cut].float(), rest]))

    def check(engine):
        asyncio.run(self_check.check_scoring(SimpleNamespace(engine=engine, head=fake_head()), [list(range(70))]))

    check(FakeScoringEngine())
    with pytest.raises(NotServed, match="a text of 70 tokens has other distributions in company"):
        check(Splits())


def test_the_tolerance_is_below_any_transform():
    head = fake_head()
    head_check.require_same_logits(lambda states: head.logits(states * (1 + 2**-11)), head.logits, 16)
    with pytest.raises(NotServed, match=r"factor of 0.99"):
        head_check.require_same_logits(lambda states: 0.99 * head.logits(states), head.logits, 16)
