"""Reading the head of a checkpoint's files: tied, untied, biased, padded, quantized, under other names, or refused."""

from __future__ import annotations

import hashlib
import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from tutelage.errors import DataError, NotServed
from tutelage.teacher_server.model.head_check import load_unembedding

EMBEDDING = torch.arange(32, dtype=torch.bfloat16).reshape(8, 4) - 16
HEAD = -EMBEDDING
UNTIED = {"tie_word_embeddings": False}
SIZES = {"vocab_size": 8, "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 4}
GPT2 = {"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1}


def checkpoint(folder, tensors, **config):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_tied(tmp_path):
    folder = checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING}, tie_word_embeddings=True)
    head = load_unembedding(folder, vocabulary_size=8)
    assert torch.equal(head.weight_VD, EMBEDDING)
    assert (head.bias_V, head.scale, head.softcap) == (None, 1.0, 0.0)


@pytest.mark.parametrize(("tied", "expected"), [(None, HEAD), (False, HEAD), (True, EMBEDDING)])
def test_a_stored_head_counts_unless_the_model_is_tied(tmp_path, tied, expected):
    tensors = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": HEAD}
    config = {} if tied is None else {"tie_word_embeddings": tied}
    assert torch.equal(load_unembedding(checkpoint(tmp_path, tensors, **config), 8).weight_VD, expected)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (GPT2, "wte.weight"),
        (GPT2, "transformer.wte.weight"),
        ({"model_type": "gpt_neox"} | UNTIED, "embed_out.weight"),
        ({"model_type": "gemma3", "text_config": SIZES}, "language_model.model.embed_tokens.weight"),
        ({"model_type": "gemma3", "text_config": SIZES}, "model.language_model.embed_tokens.weight"),
        ({"model_type": "qwen2_5_vl", "text_config": SIZES} | UNTIED, "lm_head.weight"),
    ],
)
def test_names_of_other_versions_and_of_text_towers_are_found(config, name, tmp_path):
    assert torch.equal(load_unembedding(checkpoint(tmp_path, {name: HEAD}, **config), 8).weight_VD, HEAD)


def test_padded_rows_are_cut_off(tmp_path):
    assert torch.equal(load_unembedding(checkpoint(tmp_path, {"lm_head.weight": HEAD}), 6).weight_VD, HEAD[:6])


def test_bias_and_digest(tmp_path):
    bias = torch.arange(8).bfloat16()
    tensors = {"lm_head.weight": HEAD, "lm_head.bias": bias}
    head = load_unembedding(checkpoint(tmp_path, tensors, model_type="phi", **UNTIED), 8)
    assert head.bias_V is not None
    assert torch.equal(head.bias_V, bias.float())
    bits = HEAD.view(torch.uint16).numpy().tobytes() + bias.float().numpy().tobytes()
    assert head.digest == hashlib.sha256(bits).hexdigest()


def test_half_precision_becomes_single(tmp_path):
    assert load_unembedding(checkpoint(tmp_path, {"lm_head.weight": HEAD.half()}), 8).weight_VD.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "name", "scale"),
    [
        (torch.float8_e4m3fn, "weight_scale", torch.tensor(0.5)),
        (torch.float8_e4m3fn, "weight_scale", torch.arange(1.0, 9.0).reshape(8, 1)),
        (torch.int8, "weight_scale", torch.arange(1.0, 9.0).bfloat16()),
        (torch.float8_e4m3fn, "weight_scale_inv", torch.tensor([[1.0, 2.0], [4.0, 8.0]])),
        (torch.float8_e5m2, "weight_scale_inv", torch.tensor([[2.0]])),
    ],
    ids=["fp8", "fp8, a scale a row", "int8, a scale a row", "fp8 in blocks", "fp8 with a wide exponent"],
)
def test_a_quantized_head_is_dequantized_and_that_is_said(dtype, name, scale, tmp_path, caplog):
    stored = (HEAD / 8).to(dtype)
    expected = torch.empty(8, 4)
    for row in range(8):
        for column in range(4):
            if scale.numel() == 1:
                own = scale.item()
            elif scale.numel() == 8:
                own = scale.flatten()[row].item()
            else:
                own = scale[row // 4, column // 2].item()
            expected[row, column] = float(stored[row, column]) * own
    blocks = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 2]}}
    folder = checkpoint(tmp_path, {"lm_head.weight": stored, f"lm_head.{name}": scale}, **blocks)
    with caplog.at_level(logging.INFO):
        head = load_unembedding(folder, 8)
    assert torch.equal(head.weight_VD, expected.bfloat16())
    assert "dequantized" in caplog.text


INT8, FP8 = HEAD.to(torch.int8), HEAD.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": INT8}, r"stored as torch\.int8; read are"),
        ({"qweight": HEAD.int(), "scales": HEAD}, r"stored as lm_head\.qweight, lm_head\.scales; read are"),
        (
            {"weight": INT8, "weight_scale": torch.ones(8, 1), "weight_zero_point": INT8.clone()},
            r"stored as torch\.int8; read are",
        ),
        ({"weight": FP8, "weight_scale_inv": torch.ones(3, 2)}, r"scales of \(3, 2\); read are"),
    ],
    ids=["no scales", "packed", "zero points", "scales that do not fit"],
)
def test_other_quantized_heads_are_refused(tensors, said, tmp_path):
    named = {f"lm_head.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(NotServed, match=said):
        load_unembedding(checkpoint(tmp_path, named), 8)


def test_fewer_rows_than_ids_is_refused(tmp_path):
    with pytest.raises(DataError, match="8 rows for 9 token ids"):
        load_unembedding(checkpoint(tmp_path, {"lm_head.weight": HEAD}), 9)


def test_no_head_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no head: no tensor of it is lm_head\.weight"):
        load_unembedding(checkpoint(tmp_path, {"model.embed_tokens.weight": EMBEDDING}, **UNTIED), 8)


@pytest.mark.parametrize("model_type", ["vit", "t5", "sam"])
def test_a_model_that_makes_no_logits_of_next_tokens_is_refused(model_type, tmp_path):
    with pytest.raises(NotServed, match=f"no model of type '{model_type}'"):
        load_unembedding(checkpoint(tmp_path, {"lm_head.weight": HEAD}, model_type=model_type), 8)


def test_the_head_of_a_real_checkpoint_makes_its_logits(tiny_model):
    from transformers import AutoModelForCausalLM

    from tutelage.teacher_server.signals.logit_head import SignalHead

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        output = model(torch.arange(40)[None], output_hidden_states=True)
    head = SignalHead(load_unembedding(tiny_model, 512), device="cpu")
    torch.testing.assert_close(head.logits(output.hidden_states[-1][0]), output.logits[0], rtol=1e-5, atol=1e-4)
