"""The queueing model of a teacher against what can be said of it by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"
sys.path.append(str(PATH.parent))  # of what it imports
SPEC = importlib.util.spec_from_file_location("scaling", PATH)
scaling = importlib.util.module_from_spec(SPEC)
sys.modules["scaling"] = scaling
SPEC.loader.exec_module(scaling)

COSTS = scaling.Costs(pass_seconds=0.05, token_seconds=0.001, row_seconds=0.0004)


def test_one_sequence_takes_a_pass_and_its_rows() -> None:
    seen = scaling.simulated(COSTS, scaling.Load(1, 1, 100, 3.0), batch_tokens=512)
    assert seen.answer_seconds == pytest.approx(0.05 + 100 * 0.001 + 100 * 0.0004)


def test_the_first_sequence_goes_alone_and_the_head_works_beside_the_engine() -> None:
    seen = scaling.simulated(COSTS, scaling.Load(1, 3, 100, 3.0), batch_tokens=512)
    assert seen.answer_seconds == pytest.approx((0.05 + 0.1) + (0.05 + 0.2) + 2 * 0.04)


def test_prompts_cost_the_engine_and_not_the_head() -> None:
    seen = scaling.simulated(COSTS, scaling.Load(1, 1, 100, 3.0, scored=10), batch_tokens=512)
    assert seen.answer_seconds == pytest.approx(0.05 + 0.1 + 10 * 0.0004)


def test_a_sequence_longer_than_a_batch_takes_several_passes() -> None:
    seen = scaling.simulated(COSTS, scaling.Load(1, 1, 1000, 3.0), batch_tokens=400)
    assert seen.answer_seconds == pytest.approx(3 * 0.05 + 1.0 + 0.4)


@pytest.mark.parametrize("costs", [COSTS, scaling.Costs(0.05, 0.0001, 0.002)], ids=["engine", "head"])
def test_many_students_get_what_full_passes_give_and_no_more(costs) -> None:
    ceiling = costs.tokens_a_second(512)
    seen = scaling.simulated(costs, scaling.Load(64, 8, 128, 1.0), batch_tokens=512)
    assert seen.tokens_a_second == pytest.approx(ceiling, rel=0.02)
    two = scaling.simulated(costs, scaling.Load(64, 8, 128, 1.0), batch_tokens=512, servers=2)
    assert two.tokens_a_second == pytest.approx(2 * ceiling, rel=0.05)


def test_the_fit_finds_the_costs_of_a_teacher_that_is_as_the_model_says() -> None:
    points = [(load, scaling.simulated(COSTS, load, batch_tokens=512)) for load in scaling.FITTED]
    found = scaling.fitted(points, 512)
    for name in ("pass_seconds", "token_seconds", "row_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=0.05), name
