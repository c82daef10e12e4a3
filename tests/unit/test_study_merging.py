"""An adapter folded into its model: the same logits, made once; a whole model stays as it is."""

from __future__ import annotations

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.data.merging import whole_model


def test_a_merged_adapter_has_the_logits_of_model_and_adapter(tiny_model, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "step-1")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "step-1")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = adapted(ids).logits

    merged = whole_model(tmp_path / "step-1")

    assert merged == tmp_path / "step-1-merged"
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0.1)
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(ids).logits
    assert (plain - expected).abs().max() > 1.0
    made = (merged / "model.safetensors").stat().st_mtime_ns
    assert whole_model(tmp_path / "step-1") == merged
    assert (merged / "model.safetensors").stat().st_mtime_ns == made


def test_a_whole_model_is_taken_as_it_is(tiny_model):
    assert whole_model(tiny_model) == tiny_model.resolve()
