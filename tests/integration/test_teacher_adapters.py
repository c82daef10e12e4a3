"""vLLM with a LoRA adapter against transformers with the same one; long, because it starts an engine of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_adapter import IDS, write_adapter
from teacher_process import running
from tutelage.identity import tokenizer_digests
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient


@pytest.mark.long
def test_one_server_answers_with_and_without_an_adapter(tiny_model: Path, tmp_path: Path):
    expected = dict(zip((None, "maths"), write_adapter(tiny_model, tmp_path / "adapter"), strict=True))
    digests = set()
    # A cache of 300 tokens, and a model that would take 512.
    options = ("--lora-modules", f"maths={tmp_path / 'adapter'}", "--kv-cache-memory-bytes", str(300 * 2048))
    with running(tmp_path / "server", tiny_model, *options) as server:
        assert "the key-value cache holds no more, the model would take 512" in server.log.read_text()
        for adapter, reference in expected.items():
            values = {"student_id": "ann", "wait_seconds": 60, "tokenizer_digests": tokenizer_digests(tiny_model)}
            with TeacherClient(server.address, adapter=adapter, **values) as client:
                (signals,) = client.score([TokenSequence(IDS, 0, len(IDS))], SignalSpec("hidden"))
                digests.add(client.identity.weights_digest)
            states = torch.from_numpy(signals["hidden_RD"].copy()).view(torch.bfloat16).float()
            assert (states - reference).norm() < 0.1 * reference.norm()
    assert (expected[None] - expected["maths"]).norm() > 0.5 * expected[None].norm()
    assert len(digests) == 2
