"""A LoRA adapter of the tiny model, of a size that shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

IDS = np.arange(5, 45, dtype=np.int32)


def write_adapter(model: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapter of a size that shows; the states [T, D] without and with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    states = adapted.base_model.model.model
    with torch.inference_mode():
        with adapted.disable_adapter():
            without = states(torch.from_numpy(IDS).long()[None]).last_hidden_state[0]
        return without, states(torch.from_numpy(IDS).long()[None]).last_hidden_state[0]
