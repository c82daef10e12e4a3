"""The best checkpoint by a held-out metric, and a training that ends when it gets no better."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trainer_cases import metric_rows, student_config, write_rows
from tutelage.errors import ConfigurationError
from tutelage.trainer.checkpoint.best import Best
from tutelage.trainer.training.control import Control
from tutelage.trainer.training.loop import train

HOPELESS = {
    "objective": {"name": "sft"},
    "optimizer": {"learning_rate": 1.0, "warmup_steps": 0, "lr_scheduler_type": "constant_with_warmup"},
    "held_out": {"sequences": 4, "every_steps": 1},
    "best": {"metric": "heldout/cross_entropy", "patience": 3},
    "save_every_steps": 2,
    "keep_checkpoints": 1,
    "steps": 50,
}


class Recorder:
    every_steps = 0

    def __init__(self) -> None:
        self.submitted: list[tuple[int, Path]] = []

    def submit(self, step: int, checkpoint: Path, *, finished: bool = False) -> None:
        self.submitted.append((step, checkpoint))

    def submit_again(self, step: int, checkpoint: Path) -> None:
        pass


def test_a_training_that_gets_no_better_ends_and_its_best_checkpoint_stays(tiny_model, tmp_path):
    """Stopped on the way and resumed: the checkpoint remembers how long ago the best was."""
    data = write_rows(tmp_path / "rows.jsonl")
    config = student_config(tiny_model, data, **HOPELESS)
    control, folder = Control(), tmp_path / "student"

    def stop(progress) -> None:
        if progress.step == 3:
            control.stop()

    assert not train(config, folder=folder, teacher=None, report=stop, control=control).finished
    recorder = Recorder()
    outcome = train(config, folder=folder, teacher=None, evaluations=recorder)
    values = [row["heldout/cross_entropy"] for row in metric_rows(folder)]
    best = min(range(1, len(values)), key=values.__getitem__)
    assert outcome.finished
    assert outcome.step == best + 3 < 50
    assert (folder / "checkpoints/best").resolve().name == f"step-{best:08d}"
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"best", f"step-{best:08d}", f"step-{outcome.step:08d}"}
    assert recorder.submitted == [
        (outcome.step, outcome.checkpoint),
        (best, folder / "checkpoints" / f"step-{best:08d}"),
    ]
    # Asked again, it has nothing more to do.
    assert train(config, folder=folder, teacher=None).step == outcome.step


def test_a_later_measurement_must_be_better_to_be_the_best():
    best = Best().after(10, "heldout/jsd", 0.5).after(20, "heldout/jsd", 0.5)
    assert best == Best(10, 0.5, 1)
    assert best.after(30, "heldout/jsd", 0.4) == Best(30, 0.4, 0)
    nan = Best().after(10, "heldout/jsd", float("nan"))
    assert nan == Best(0, None, 1)
    assert nan.after(20, "heldout/jsd", 0.5) == Best(20, 0.5, 0)
    agreement = Best().after(10, "heldout/top1_agreement", 0.5)
    assert agreement.after(20, "heldout/top1_agreement", 0.6) == Best(20, 0.6, 0)


def test_epochs_are_passes_over_the_training_rows(tiny_model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", count=14)
    config = student_config(tiny_model, data, objective={"name": "sft"}, epochs=2)
    outcome = train(config, folder=tmp_path / "student", teacher=None)
    assert outcome.step == 2 * (14 - 4) // 4
    assert yaml.safe_load((tmp_path / "student/student.yaml").read_text())["steps"] == 5


def test_a_metric_that_there_will_not_be_is_refused(tiny_model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"held_out\.sequences"):
        student_config(tiny_model, data, best={}, held_out={"sequences": 0})
    config = student_config(tiny_model, data, objective={"name": "sft"}, best={"metric": "heldout/forward_kl"})
    with pytest.raises(ConfigurationError, match="use heldout/cross_entropy"):
        train(config, folder=tmp_path / "student", teacher=None)
