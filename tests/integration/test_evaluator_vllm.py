"""The vLLM engine writes what the transformers engine writes, into the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Sampling
from tutelage.evaluator.models.registry import open_engine
from tutelage.evaluator.results.frames import read
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest

DIFFERENT = ["engine", "seconds"]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_both_engines_give_the_same_rows(
    packaged_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    tasks = (TaskRequest("arithmetic", "paper", 8), TaskRequest("arithmetic", "loglik", 8))
    evaluation = Evaluation("one", packaged_models[0], Labels("r1", "teacher"), tasks)
    for engine in ("transformers", "vllm"):
        settings = EvaluationSettings(prompt="chat", max_new_tokens=24, engine=engine, dtype="float32")
        evaluate(evaluation, settings, tmp_path / engine)
    ours, vllms = (read(tmp_path / engine).collect() for engine in ("transformers", "vllm"))
    assert set(vllms["engine"]) == {"vllm"}
    assert ours.filter(protocol="loglik").drop(DIFFERENT).equals(vllms.filter(protocol="loglik").drop(DIFFERENT))
    same = (ours["output"] == vllms["output"]).sum()
    assert same >= len(ours) - 1  # a tie in rounding may turn one greedy answer


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_runs_give_the_same_rows(
    packaged_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # Long texts in bfloat16, so that a batch that holds something else would turn some of them.
    settings = EvaluationSettings(prompt="chat", max_new_tokens=96, engine="vllm", dtype="bfloat16")
    evaluation = Evaluation(
        "one", packaged_models[0], Labels("r1", "teacher"), (TaskRequest("arithmetic", "paper", 64),)
    )
    for run in ("first", "second"):
        evaluate(evaluation, settings, tmp_path / run)
    first, second = (read(tmp_path / run).collect().drop("seconds") for run in ("first", "second"))
    assert first.equals(second)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_seeded_prompts_that_do_not_fit_one_batch_are_answered(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = open_engine("vllm", tiny_model, dtype="float32", batch_size=64)
    try:
        # 12,800 tokens at once, three batches of vLLM's: by itself it would compute a prompt in part at each border.
        prompts = [[3 + (number + place) % 400 for place in range(200)] for number in range(64)]
        generations = engine.generate(prompts, range(64), Sampling(temperature=0.8, max_new_tokens=8))
    finally:
        engine.close()
    assert len(generations) == 64
