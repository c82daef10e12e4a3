"""What a student shows to Ray: its metrics, and the lines of its log."""

from __future__ import annotations

import shutil

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


@pytest.fixture(autouse=True)
def nothing_recorded_yet():
    Recorded.values.clear()


def test_the_gauges_have_the_newest_values_and_nothing_that_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setattr(gauges, "Gauge", Recorded)
    monkeypatch.setattr(gauges.time, "time", lambda: 1000.0)
    shown = gauges.PrometheusGauges("math", "ann", tmp_path / "not there yet")
    shown.update(Progress("ann", 0, 6, "loading"))
    known = {("step",): 0, ("steps",): 6, ("paused",): 0, ("last_step_timestamp_seconds",): 1000}
    assert Recorded.values == {(name, "math", "ann"): value for (name,), value in known.items()}
    shown.update(Progress("ann", 3, 6, "sampling", METRICS))
    known |= {("step",): 3, ("loss",): 0.5, ("tokens_per_second",): pytest.approx(50)}
    phases = {("phase_seconds", "math", "ann", "sampling"): 1.5, ("phase_seconds", "math", "ann", "scoring"): 0.5}
    assert Recorded.values == {(name, "math", "ann"): value for (name,), value in known.items()} | phases


def test_the_time_of_the_last_step_is_that_of_a_step(monkeypatch, tmp_path):
    """A student that reports phases and makes no step must look as old as its last step, or nobody sees it stall."""
    monkeypatch.setattr(gauges, "Gauge", Recorded)
    now = iter([10.0, 20.0, 99.0])
    monkeypatch.setattr(gauges.time, "time", lambda: next(now))
    shown = gauges.PrometheusGauges("math", "ann", tmp_path)
    seen = []
    for step, phase in ((0, "loading"), (0, "waiting for the teacher"), (1, "sampling"), (1, "scoring"), (1, "saving")):
        shown.update(Progress("ann", step, 6, phase))
        seen.append(Recorded.values["last_step_timestamp_seconds", "math", "ann"])
    assert seen == [10, 10, 20, 20, 20]
    shown.paused(True)
    assert Recorded.values["paused", "math", "ann"] == 1


def test_the_room_on_the_disk_is_that_of_the_students_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(gauges, "Gauge", Recorded)
    gauges.PrometheusGauges("math", "ann", tmp_path).update(Progress("ann", 0, 6, "loading"))
    free, size = (Recorded.values[f"disk_{name}_bytes", "math", "ann"] for name in ("free", "size"))
    assert 0 < free < size == shutil.disk_usage(tmp_path).total


def test_a_line_says_the_step_and_what_is_known():
    assert progress_line(0, 6, metric_texts({}), "loading") == "step 0/6, loading"
    known = METRICS | {"heldout/forward_kl": 2.0}
    assert progress_line(3, 6, metric_texts(known), "saving") == (
        "step 3/6, loss 0.500, held-out KL 2.000, tokens/s 50, saving"
    )
