"""What a checkpoint is called in its rows: as its training left it, and never as another checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.errors import CheckpointError, Conflict
from tutelage.evaluator.cli import main
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.results.frames import read
from tutelage.evaluator.runner import evaluation as evaluation_module
from tutelage.evaluator.runner import preflight
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.labels import labels_of_checkpoint
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest

TASKS = (TaskRequest("arithmetic", "loglik", 3),)


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_module, "open_engine", lambda *_args, **_options: EchoEngine())
    monkeypatch.setattr(preflight, "require_checkpoint", lambda checkpoint: None)


def trained(run_dir: Path, student: str, step: int, *, objective: str = "gkd", weights: bytes = b"") -> Path:
    """A checkpoint as a training leaves it."""
    folder = run_dir / "students" / student
    checkpoint = write_checkpoint(folder / "checkpoints" / f"step-{step:08d}")
    (checkpoint / "model.safetensors").write_bytes(weights or f"{student} {step}".encode())
    (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    settings = f"id: {student}\nseed: 3\nobjective: {{name: {objective}, temperature: 2.0, noise: 0.5}}\n"
    (folder / "student.yaml").write_text(settings)
    return checkpoint


def command(checkpoint: Path, out: Path, *flags: str) -> int:
    what = ["--checkpoint", str(checkpoint), "--tasks", "arithmetic:loglik", "--limit", "3", "--out", str(out)]
    return main([*what, "--engine", "transformers", *flags])


def test_a_command_calls_a_checkpoint_as_its_training_did(tmp_path: Path) -> None:
    for student, objective in (("a", "gkd"), ("b", "sft")):
        assert command(trained(tmp_path / "r7", student, 20, objective=objective), tmp_path / "f") == 0
    rows = read(tmp_path / "f").collect()
    columns = ["run", "student", "objective", "temperature", "noise", "step", "training_seed"]
    assert sorted(rows.select(columns).unique().rows()) == [
        ("r7", "a", "gkd", 2.0, 0.5, 20, 3),
        ("r7", "b", "sft", 2.0, 0.5, 20, 3),
    ]


def test_what_is_given_goes_before_what_is_found(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "r7", "a", 20)
    given = {"student": "mine", "temperature": 0.0, "run": None}
    labels = labels_of_checkpoint(checkpoint, given)
    assert (labels.run, labels.student, labels.temperature, labels.objective) == ("r7", "mine", 0.0, "gkd")


def test_the_state_says_the_step_and_not_the_folder(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "r7", "a", 20)
    (checkpoint / "state.json").write_text(json.dumps({"step": 21}))
    assert labels_of_checkpoint(checkpoint).step == 21


def test_a_link_to_a_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(trained(tmp_path / "r7", "a", 20))
    assert labels_of_checkpoint(tmp_path / "best").student == "a"


def test_a_model_from_elsewhere_is_called_as_its_folder(tmp_path: Path) -> None:
    assert labels_of_checkpoint(write_checkpoint(tmp_path / "SmolLM2")) == Labels("default", "SmolLM2")


@pytest.mark.parametrize("text", ["- a list", "objective: 3", "seed: many"])
def test_settings_that_say_nothing_are_refused(text: str, tmp_path: Path) -> None:
    checkpoint = trained(tmp_path / "r7", "a", 20)
    (checkpoint.parents[1] / "student.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"student\.yaml does not say what was trained.*--student"):
        labels_of_checkpoint(checkpoint)


def test_another_checkpoint_of_the_same_labels_is_refused(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one" / "model")
    two = write_checkpoint(tmp_path / "two" / "model")
    (two / "model.safetensors").write_bytes(b"other weights")
    assert command(one, tmp_path / "f") == 0
    with pytest.raises(Conflict, match=r"one/model under the labels of .*two/model.*name this one by --student"):
        command(two, tmp_path / "f")
    assert command(two, tmp_path / "f", "--student", "two") == 0
    assert command(one, tmp_path / "f", "--seed", "1") == 0  # the same weights once more
    assert read(tmp_path / "f").collect()["student"].unique().sort().to_list() == ["model", "two"]


def test_a_file_that_cannot_be_read_is_no_reason_to_evaluate_nothing(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    damaged = tmp_path / "f" / "run=r1" / "task=arithmetic" / "other--loglik.parquet"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"not Parquet")
    paths = evaluate(Evaluation("one", checkpoint, Labels("r1", "s"), TASKS), EvaluationSettings(), tmp_path / "f")
    assert [path.name for path in paths] == ["one--loglik.parquet"]


def test_two_commands_of_one_id_do_not_remove_each_others_batches(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", manifest=True)
    first = Evaluation("one", checkpoint, Labels("r1", "s"), TASKS)
    second = Evaluation("one", checkpoint, Labels("r1", "s"), (TaskRequest("arithmetic", "paper", 6),))
    settings, seen = EvaluationSettings(prompt="chat"), []

    def in_the_middle(progress: object) -> None:
        if not seen:
            seen.append(progress)
            evaluate(first, settings, tmp_path / "f", engines=lambda _: EchoEngine())
            parts = list((tmp_path / "f.unfinished").rglob("*.parquet"))
            assert len(parts) == 1  # the batch that the second one has finished

    evaluate(second, settings, tmp_path / "f", engines=lambda _: EchoEngine(), on_progress=in_the_middle)
    assert len(read(tmp_path / "f").collect()) == 9
    assert not list((tmp_path / "f.unfinished").iterdir())
