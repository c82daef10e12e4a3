"""A second teacher for tests: the tiny model's tokenizer, half its width."""

from __future__ import annotations

import shutil
from pathlib import Path


def narrow_model(tiny_model: Path, folder: Path) -> Path:
    """Writes it to a folder, which is returned."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 64, 128, 2, 16
    torch.manual_seed(5)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder
