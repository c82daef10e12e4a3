"""Reading the head of a checkpoint: tied, untied, biased, scaled, capped, padded, or refused."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from tutelage.errors import DataError, NotServed
from tutelage.teacher_server.signals import unembedding

EMBEDDING = torch.arange(24, dtype=torch.bfloat16).reshape(8, 3)
HEAD = -EMBEDDING


def checkpoint(folder, tensors, **config):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_tied(tmp_path):
    head = unembedding.load(checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING}), vocabulary_size=8)
    assert torch.equal(head.weight_VD, EMBEDDING)
    assert (head.bias_V, head.scale, head.softcap) == (None, 1.0, 0.0)


@pytest.mark.parametrize(("tied", "expected"), [(None, HEAD), (False, HEAD), (True, EMBEDDING)])
def test_a_stored_head_counts_unless_the_model_is_tied(tmp_path, tied, expected):
    tensors = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": HEAD}
    config = {} if tied is None else {"tie_word_embeddings": tied}
    assert torch.equal(unembedding.load(checkpoint(tmp_path, tensors, **config), 8).weight_VD, expected)


def test_padded_rows_are_cut_off(tmp_path):
    head = unembedding.load(checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING}), vocabulary_size=6)
    assert torch.equal(head.weight_VD, EMBEDDING[:6])


def test_bias_and_digest(tmp_path):
    bias = torch.arange(8).bfloat16()
    tensors = {"lm_head.weight": HEAD, "lm_head.bias": bias}
    head = unembedding.load(checkpoint(tmp_path, tensors, model_type="phi", tie_word_embeddings=False), 8)
    assert head.bias_V is not None
    assert torch.equal(head.bias_V, bias.float())
    bits = HEAD.view(torch.uint16).numpy().tobytes() + bias.float().numpy().tobytes()
    assert head.digest == hashlib.sha256(bits).hexdigest()


def test_half_precision_becomes_single(tmp_path):
    head = unembedding.load(checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING.half()}), 8)
    assert head.weight_VD.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, 1.0, 0.0),
        ({"model_type": "cohere", "logit_scale": 0.125}, 0.125, 0.0),
        ({"model_type": "cohere2"}, 0.0625, 0.0),
        ({"model_type": "granite", "logits_scaling": 8.0}, 0.125, 0.0),
    ],
)
def test_what_models_do_after_the_matrix(tmp_path, config, scale, softcap):
    head = unembedding.load(checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING}, **config), 8)
    assert (head.scale, head.softcap) == (scale, softcap)


def test_an_unknown_head_is_refused(tmp_path):
    folder = checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING}, model_type="falcon_h1")
    with pytest.raises(NotServed, match="'falcon_h1' is not known"):
        unembedding.load(folder, 8)


def test_a_quantized_head_is_refused(tmp_path):
    folder = checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING.to(torch.int8)})
    with pytest.raises(NotServed, match="int8"):
        unembedding.load(folder, 8)


def test_fewer_rows_than_ids_is_refused(tmp_path):
    folder = checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING})
    with pytest.raises(DataError, match="8 rows for 9 token ids"):
        unembedding.load(folder, 9)


def test_no_head_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither a head nor one token embedding"):
        unembedding.load(checkpoint(tmp_path, {"model.norm.weight": EMBEDDING}), 8)


def test_the_head_of_a_real_checkpoint_makes_its_logits(tiny_model):
    from transformers import AutoModelForCausalLM

    from tutelage.teacher_server.signals.logit_head import SignalHead

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        output = model(torch.arange(40)[None], output_hidden_states=True)
    head = SignalHead(unembedding.load(tiny_model, 512), device="cpu")
    torch.testing.assert_close(head.logits(output.hidden_states[-1][0]), output.logits[0], rtol=1e-5, atol=1e-4)
