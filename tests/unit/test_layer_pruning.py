"""Which layers a student may do without."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tutelage.trainer.model.layer_pruning import block_influence


def test_block_influence_is_one_minus_the_cosine_of_input_and_output(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    idle = model.model.layers[1]
    torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
    torch.nn.init.zeros_(idle.mlp.down_proj.weight)
    sequences = [torch.arange(3, 9), torch.arange(20, 50)]
    given, made = [], []
    for ids in sequences:
        # transformers' own hidden states: the last of them has gone through the norm, and is left out
        states = model(ids[None], output_hidden_states=True).hidden_states
        given.append(np.stack([each[0].detach().numpy().astype(np.float64) for each in states[:-2]]))
        made.append(np.stack([each[0].detach().numpy().astype(np.float64) for each in states[1:-1]]))
    before, after = np.concatenate(given, 1), np.concatenate(made, 1)
    lengths = np.linalg.norm(before, axis=-1) * np.linalg.norm(after, axis=-1)
    expected = (1 - (before * after).sum(-1) / lengths).mean(1)
    found = block_influence(model, sequences)
    assert len(found) == len(model.model.layers)
    np.testing.assert_allclose(found[:-1], expected, atol=1e-9)
    assert abs(found[1]) < 1e-12
    assert found[-1] > 0
