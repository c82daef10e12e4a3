"""Trackers get copies of the metrics and can neither hold a training up nor end it."""

from __future__ import annotations

import importlib.machinery
import logging
import sys
import threading
import time
import types

import pytest

from tutelage.errors import ConfigurationError
from tutelage.trainer.metrics.log import MetricsLog
from tutelage.trainer.metrics.trackers import Tracker, open_trackers

ROW = {"step": 3, "time_seconds": 1.0, "student": "ann", "train/loss": 0.5, "train/tokens": 7}


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the trackers' packages, which record the calls that they get."""
    calls = []

    def install(name: str, **members) -> None:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    def recorder(name, result=None):
        def call(*arguments, **keywords):
            calls.append((name, arguments, keywords))
            return result

        return call

    run = types.SimpleNamespace(log=recorder("wandb.log"), finish=recorder("wandb.finish"))
    install("wandb", init=recorder("wandb.init", run))
    install("trackio", init=recorder("init"), log=recorder("trackio.log"), finish=recorder("trackio.finish"))
    writer = types.SimpleNamespace(add_scalar=recorder("add_scalar"), close=recorder("tensorboard.close"))
    install("tensorboard")
    install("torch.utils.tensorboard", SummaryWriter=recorder("SummaryWriter", writer))
    return calls


def test_each_tracker_gets_the_numbers_of_every_row(packages, tmp_path):
    folder = tmp_path / "ann"
    trackers = open_trackers(["wandb", "trackio", "tensorboard"], folder)
    with MetricsLog(folder, offset_bytes=0, trackers=trackers) as metrics:
        metrics.append(ROW)
    values = {"train/loss": 0.5, "train/tokens": 7.0}
    assert ("wandb.log", (values,), {"step": 3}) in packages
    assert ("trackio.log", (values,), {"step": 3}) in packages
    assert [call[1] for call in packages if call[0] == "add_scalar"] == [
        ("train/loss", 0.5, 3),
        ("train/tokens", 7.0, 3),
    ]
    assert ("SummaryWriter", (folder / "tensorboard",), {}) in packages
    assert {name for name, _, _ in packages} >= {"wandb.finish", "trackio.finish", "tensorboard.close"}


def test_a_tracker_that_is_not_installed_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install wandb, or leave it out"):
        open_trackers(["wandb"], tmp_path)


def test_a_tracker_that_hangs_holds_nothing_up_and_its_loss_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tutelage.trainer.metrics.trackers._QUEUED_ROWS", 2)
    monkeypatch.setattr("tutelage.trainer.metrics.trackers._CLOSING_SECONDS", 0.2)
    release = threading.Event()
    tracker = Tracker("slow", lambda folder: (lambda step, values: release.wait(30), release.set), tmp_path)
    start = time.monotonic()
    for step in range(1000):
        tracker.write({**ROW, "step": step})
    with caplog.at_level(logging.WARNING):
        tracker.close()
    assert time.monotonic() - start < 5
    release.set()
    assert "slow missed 99" in caplog.text


@pytest.mark.parametrize("where", ["opening", "logging"])
def test_a_tracker_that_fails_is_given_up_with_a_warning(where, tmp_path, caplog):
    def fail(*_):
        raise ConnectionError("no route to the tracker")

    opener = fail if where == "opening" else lambda folder: (fail, fail)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("broken", opener, tmp_path)
        for step in range(3):
            tracker.write({**ROW, "step": step})
        tracker.close()
    assert "broken is given up: ConnectionError" in caplog.text
