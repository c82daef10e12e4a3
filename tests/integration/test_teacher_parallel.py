"""One teacher in one process and in two, tensor parallel: the same signals, with and without a LoRA adapter.

Two splits of a sum in bfloat16 differ by roundings. How much that is, transformers says: what bfloat16 costs its own
logits. Long, because it starts two servers, the second with an engine of two processes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_adapter import write_adapter
from teacher_process import running
from tutelage.identity import tokenizer_digests
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient

K, TEMPERATURES = 16, (0.5, 1.0, 2.0)
RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(3, 500, length).astype(np.int32) for length in (5, 40, 128, 300)]
CANDIDATES = [RNG.integers(0, 500, (len(ids), 8)).astype(np.int32) for ids in SEQUENCES]
SPECS = {
    "hidden": SignalSpec("hidden"),
    "topk": SignalSpec("topk", k=K, temperatures=TEMPERATURES),
    "candidates": SignalSpec("candidates", temperatures=TEMPERATURES),
}


def signals(address: str, model: Path, adapter: str | None) -> dict[str, list[SignalArrays]]:
    """The answers to all sequences, by kind."""
    given = [
        TokenSequence(ids, 0, len(ids), candidate_ids_RC=rows) for ids, rows in zip(SEQUENCES, CANDIDATES, strict=True)
    ]
    plain = [TokenSequence(ids, 0, len(ids)) for ids in SEQUENCES]
    values = {"student_id": "ann", "wait_seconds": 60, "tokenizer_digests": tokenizer_digests(model)}
    with TeacherClient(address, adapter=adapter, **values) as client:
        return {kind: client.score(given if kind == "candidates" else plain, spec) for kind, spec in SPECS.items()}


def logits(answers: list[SignalArrays], head_VD: torch.Tensor) -> torch.Tensor:
    """float64 [N, V], of the signal `hidden`."""
    states = [torch.from_numpy(answer["hidden_RD"].copy()).view(torch.bfloat16) for answer in answers]
    return torch.cat(states).double() @ head_VD.double().T


def kl(p_NV: torch.Tensor, q_NV: torch.Tensor) -> float:
    """Mean KL(p ‖ q), nats a row."""
    p_logp, q_logp = p_NV.double().log_softmax(1), q_NV.double().log_softmax(1)
    return float((p_logp.exp() * (p_logp - q_logp)).sum(1).mean())


def own_logits(model: Path, adapter: Path | None, dtype: torch.dtype) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if adapter is not None:
        own = PeftModel.from_pretrained(own, adapter)
    with torch.inference_mode():
        return torch.cat([own(torch.from_numpy(ids).long()[None]).logits[0] for ids in SEQUENCES])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_processes_give_the_signals_of_one(tiny_model: Path, tmp_path: Path):
    write_adapter(tiny_model, tmp_path / "adapter")
    served: dict[int, dict[str | None, dict[str, list[SignalArrays]]]] = {}
    for processes in (1, 2):
        options = ("--tensor-parallel-size", str(processes), "--lora-modules", f"maths={tmp_path / 'adapter'}")
        with running(tmp_path / f"of-{processes}", tiny_model, *options) as server:
            assert len(server.engines) == (1 if processes == 1 else 3)  # with several workers, one more leads them
            served[processes] = {adapter: signals(server.address, tiny_model, adapter) for adapter in (None, "maths")}
    for adapter in (None, "maths"):
        folder = None if adapter is None else tmp_path / "adapter"
        exact, rounded = (own_logits(tiny_model, folder, dtype) for dtype in (torch.float32, torch.bfloat16))
        cost = kl(exact, rounded)
        one, two = served[1][adapter], served[2][adapter]
        head_VD = head_of(tiny_model)
        ones, twos = logits(one["hidden"], head_VD), logits(two["hidden"], head_VD)
        print(f"{adapter}: KL to float32 of one process {kl(exact, ones):.2g}, of two {kl(exact, twos):.2g}, of each "
              f"other {kl(ones, twos):.2g}; bfloat16 costs transformers {cost:.2g}")  # fmt: skip
        assert 0 < kl(ones, twos) < 2 * cost
        assert kl(exact, twos) < 2 * cost
        spread = float((exact - rounded).abs().max())
        for kind in ("topk", "candidates"):
            for single, double in zip(one[kind], two[kind], strict=True):
                assert np.abs(single["logsumexp_RM"] - double["logsumexp_RM"]).max() < 2 * spread / min(TEMPERATURES)
                assert np.abs(single["target_logits"] - double["target_logits"]).max() < 2 * spread
        for single, double in zip(one["candidates"], two["candidates"], strict=True):
            assert np.abs(single["logits_RK"] - double["logits_RK"]).max() < 2 * spread
        for single, double in zip(one["topk"], two["topk"], strict=True):
            assert (
                np.abs(single["logits_RK"] - double["logits_RK"]).max() < 2 * spread
            )  # sorted, so ties may change ids
            assert (
                np.mean([np.isin(*rows).mean() for rows in zip(single["ids_RK"], double["ids_RK"], strict=True)]) > 0.9
            )
    assert kl(logits(served[1][None]["hidden"], head_VD), logits(served[1]["maths"]["hidden"], head_VD)) > 0.1


def head_of(model: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).get_output_embeddings().weight.detach()
