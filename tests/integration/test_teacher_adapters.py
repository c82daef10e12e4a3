"""vLLM with a LoRA adapter against transformers with the same one; long, because it starts an engine of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teacher_process import running
from tutelage.identity import tokenizer_digests
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient

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


@pytest.mark.long
def test_one_server_answers_with_and_without_an_adapter(tiny_model: Path, tmp_path: Path):
    expected = dict(zip((None, "maths"), write_adapter(tiny_model, tmp_path / "adapter"), strict=True))
    digests = set()
    with running(tmp_path / "server", tiny_model, "--lora-modules", f"maths={tmp_path / 'adapter'}") as server:
        for adapter, reference in expected.items():
            values = {"student_id": "ann", "wait_seconds": 60, "tokenizer_digests": tokenizer_digests(tiny_model)}
            with TeacherClient(server.address, adapter=adapter, **values) as client:
                (signals,) = client.score([TokenSequence(IDS, 0, len(IDS))], SignalSpec("hidden"))
                digests.add(client.identity.weights_digest)
            states = torch.from_numpy(signals["hidden_RD"].copy()).view(torch.bfloat16).float()
            assert (states - reference).norm() < 0.1 * reference.norm()
    assert (expected[None] - expected["maths"]).norm() > 0.5 * expected[None].norm()
    assert len(digests) == 2
