"""A vLLM that does not start ends an evaluation at once; it is not the fault of each item."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest
from tutelage.errors import CheckpointError

from evaluator.configuration import EvaluationSettings
from evaluator.evaluation import evaluate
from evaluator.requests import Evaluation, Labels, TaskRequest


def test_a_vllm_that_does_not_start_ends_the_evaluation(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def refuse(*_arguments: object, **_settings: object) -> None:
        starts.append(1)
        raise RuntimeError("unsupported head size")

    vllm = types.ModuleType("vllm")
    vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    vllm.LLM, vllm.SamplingParams = refuse, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    evaluation = Evaluation("one", tiny_model, Labels("r", "tiny"), (TaskRequest("arithmetic", "paper", 4),))
    with pytest.raises(CheckpointError, match=r"does not start.*unsupported head size.*transformers"):
        evaluate(evaluation, EvaluationSettings(engine="vllm", prompt="chat", max_new_tokens=4), tmp_path)
    assert len(starts) == 1
