"""What a student shows to Ray: its metrics, and the lines of its log."""

from __future__ import annotations

import pytest

from tutelage.trainer.metrics import prometheus as gauges
from tutelage.trainer.metrics.progress import Progress, metric_texts, progress_line

METRICS = {"train/loss": 0.5, "train/tokens": 100, "seconds/sampling": 1.5, "seconds/scoring": 0.5}


class Recorded:
    """Ray's gauge without Ray: the newest value by name and tags."""

    values: dict[tuple[str, ...], float] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self._name, self._keys, self._tags = name, tag_keys, {}

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self._tags = tags

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        both = self._tags | (tags or {})
        assert set(both) == set(self._keys)  # Ray refuses missing and unknown tags.
        self.values[(self._name.removeprefix("tutelage_student_"), *both.values())] = value


def test_the_gauges_have_the_newest_values_and_nothing_that_is_not_known(monkeypatch):
    monkeypatch.setattr(gauges, "Gauge", Recorded)
    shown = gauges.PrometheusGauges("math", "ann")
    shown.update(Progress("ann", 0, 6, "loading"))
    assert Recorded.values == {("step", "math", "ann"): 0}
    shown.update(Progress("ann", 3, 6, "sampling", METRICS))
    assert Recorded.values == {
        ("step", "math", "ann"): 3,
        ("loss", "math", "ann"): 0.5,
        ("tokens_per_second", "math", "ann"): pytest.approx(50),
        ("phase_seconds", "math", "ann", "sampling"): 1.5,
        ("phase_seconds", "math", "ann", "scoring"): 0.5,
    }


def test_a_line_says_the_step_and_what_is_known():
    assert progress_line(0, 6, metric_texts({}), "loading") == "step 0/6, loading"
    known = METRICS | {"heldout/forward_kl": 2.0}
    assert progress_line(3, 6, metric_texts(known), "saving") == (
        "step 3/6, loss 0.500, held-out KL 2.000, tokens/s 50, saving"
    )
