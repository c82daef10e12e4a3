"""A vLLM that does not start, or ends in the middle, ends an evaluation at once; it is not the fault of each item."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from tutelage.errors import CheckpointError, TutelageError, Unreachable
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest

CALLS = ["sleep", "enqueue", "wake_up", "wait_for_completion"]


class EngineDeadError(Exception):
    """As vLLM's."""


@pytest.fixture
def failing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[type], TutelageError]:
    """Evaluates with a vLLM made by a function, and returns the error that ended it."""

    def evaluate_with(make: Callable[..., object]) -> TutelageError:
        vllm, exceptions = types.ModuleType("vllm"), types.ModuleType("vllm.v1.engine.exceptions")
        vllm.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        vllm.LLM, vllm.SamplingParams = make, lambda **_: None  # type: ignore[attr-defined]
        exceptions.EngineDeadError = EngineDeadError  # type: ignore[attr-defined]
        platforms = types.ModuleType("vllm.platforms")
        platforms.current_platform = types.SimpleNamespace(  # type: ignore[attr-defined]
            is_cpu=lambda: True, is_unspecified=lambda: False
        )
        executors = types.ModuleType("vllm.v1.executor.uniproc_executor")
        executors.UniProcExecutor = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm.v1.executor.uniproc_executor", executors)
        # It stands for an engine that ends, not for one that is another version's.
        monkeypatch.setattr("tutelage.runtime.vllm_api.require_conforming", lambda: None)
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        monkeypatch.setitem(sys.modules, "vllm", vllm)
        monkeypatch.setitem(sys.modules, "vllm.v1.engine.exceptions", exceptions)
        evaluation = Evaluation("one", tiny_model, Labels("r", "tiny"), (TaskRequest("arithmetic", "paper", 4),))
        with pytest.raises(TutelageError) as caught:
            evaluate(evaluation, EvaluationSettings(engine="vllm", prompt="chat", max_new_tokens=4), tmp_path)
        assert not list(tmp_path.rglob("*.parquet"))
        return caught.value

    return evaluate_with


def test_one_that_does_not_start(failing: Callable[..., TutelageError]) -> None:
    starts = []

    def refuse(*_arguments: object, **_settings: object) -> None:
        starts.append(1)
        raise RuntimeError("unsupported head size")

    error = failing(refuse)
    assert isinstance(error, CheckpointError)
    assert "unsupported head size; use the engine transformers" in str(error)
    assert len(starts) == 1


@pytest.mark.parametrize("place", CALLS)
def test_one_that_ends_in_the_middle(failing: Callable[..., TutelageError], place: str) -> None:
    calls = []

    class Dead:
        llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=lambda: None))

        def __init__(self, *_arguments: object, **_settings: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            assert name in CALLS

            def call(*_arguments: object, **_settings: object) -> None:
                if name == place:
                    calls.append(1)
                    raise EngineDeadError("EngineCore encountered an issue")

            return call

    assert isinstance(failing(Dead), Unreachable)
    assert len(calls) == 1
