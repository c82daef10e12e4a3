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

NEW = {"training": "t", "next_step": 0}
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
    trackers = open_trackers(["wandb", "trackio", "tensorboard"], folder, training="t", next_step=0)
    with MetricsLog(folder, offset_bytes=0, trackers=trackers) as metrics:
        metrics.append(ROW)
    values = {"train/loss": 0.5, "train/tokens": 7.0}
    assert ("wandb.log", (values,), {"step": 3}) in packages
    assert ("trackio.log", (values,), {"step": 3}) in packages
    assert [call[1] for call in packages if call[0] == "add_scalar"] == [
        ("train/loss", 0.5, 3),
        ("train/tokens", 7.0, 3),
    ]
    assert ("SummaryWriter", (folder / "tensorboard",), {"purge_step": 0}) in packages
    assert {name for name, _, _ in packages} >= {"wandb.finish", "trackio.finish", "tensorboard.close"}


def train(folder, steps, *, next_step, training="t"):
    """What one process tells its trackers; a kill is a process that does not close them, which changes nothing here."""
    trackers = open_trackers(["wandb", "trackio", "tensorboard"], folder, training=training, next_step=next_step)
    for tracker in trackers:
        for step in steps:
            tracker.write({**ROW, "step": step})
        tracker.close()


def named(packages, name):
    return [(arguments, keywords) for call, arguments, keywords in packages if call == name]


def test_a_training_that_was_killed_is_one_run_with_each_step_once(packages, tmp_path):
    """Killed after step 5, resumed from the checkpoint of step 3."""
    train(tmp_path, [1, 2, 3, 4, 5], next_step=0)
    train(tmp_path, [4, 5, 6], next_step=4)
    for tracker in ("wandb", "trackio"):
        assert [keywords["step"] for _, keywords in named(packages, f"{tracker}.log")] == [1, 2, 3, 4, 5, 6]
    first, second = (keywords for _, keywords in named(packages, "wandb.init"))
    assert first == second
    assert (first["id"], first["resume"]) == (second["id"], "allow")
    assert len({keywords["name"] for _, keywords in named(packages, "init")}) == 1
    # TensorBoard's readers forget steps from 4 on in the first file, so they are written again.
    assert [keywords["purge_step"] for _, keywords in named(packages, "SummaryWriter")] == [0, 4]
    steps = [arguments[2] for arguments, _ in named(packages, "add_scalar") if arguments[0] == "train/loss"]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6]


def test_another_training_in_the_same_folder_and_another_student_of_that_name_are_other_runs(packages, tmp_path):
    train(tmp_path / "one" / "ann", [0, 1], next_step=0)
    train(tmp_path / "one" / "ann", [0, 1], next_step=0, training="with other settings")
    train(tmp_path / "other" / "ann", [0, 1], next_step=0)
    assert len({keywords["id"] for _, keywords in named(packages, "wandb.init")}) == 3
    assert len({keywords["name"] for _, keywords in named(packages, "init")}) == 3
    assert [keywords["step"] for _, keywords in named(packages, "wandb.log")] == [0, 1] * 3


@pytest.mark.parametrize("content", ["", "{", '{"run": 1}'])
def test_a_run_that_cannot_be_read_is_given_up_with_a_warning(content, packages, tmp_path, caplog):
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers/wandb.json").write_text(content)
    train(tmp_path, [1], next_step=0)
    assert "wandb is given up" in caplog.text
    assert not named(packages, "wandb.log")
    assert named(packages, "trackio.log")


def test_a_tracker_that_is_not_installed_is_refused_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install wandb, or leave it out"):
        open_trackers(["wandb"], tmp_path, training="t", next_step=0)


def test_a_tracker_that_hangs_holds_nothing_up_and_its_loss_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tutelage.trainer.metrics.trackers._QUEUED_ROWS", 2)
    monkeypatch.setattr("tutelage.trainer.metrics.trackers._CLOSING_SECONDS", 0.2)
    release = threading.Event()
    tracker = Tracker("slow", lambda *_: (lambda step, values: release.wait(30), release.set), tmp_path, **NEW)
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

    opener = fail if where == "opening" else lambda *_: (fail, fail)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker("broken", opener, tmp_path, **NEW)
        for step in range(3):
            tracker.write({**ROW, "step": step})
        tracker.close()
    assert "broken is given up: ConnectionError" in caplog.text
