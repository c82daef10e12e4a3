"""Several workers train one student as one does: the same losses, the same weights, checkpoints for either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.testing import assert_close
from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from trainer_workers import Case, sequences_scored, start

from trainer.carve import carve

STEPS, SEQUENCES, WORKERS = 3, 5, 2
EXACT = {"train/loss", "train/gradient_norm", "train/learning_rate", "train/tokens", "train/sample_length"}
SETTINGS = {
    "forward_kl": {},
    "sequence_mean": {
        "objective": {"name": "reverse_kl", "signal": "candidates", "k": 8},
        "reduction": "sequence_mean",
    },
    "micro_batches": {"objective": {"name": "sft"}, "reduction": "micro_batch_token_mean"},
    "own": {"objective": {"name": "gkd", "on_policy_fraction": 1.0}},
    "stale": {"objective": {"name": "gkd", "on_policy_fraction": 0.5}, "sampling": {"max_staleness": 1}},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one worker made of each case, and what two did."""
    base = tmp_path_factory.mktemp("workers")
    carve(tiny_model, base / "init", layers=2)
    data = write_rows(base / "rows.jsonl")

    def case(name: str, **changes) -> Case:
        common = {
            "dtype": "float32",
            "steps": STEPS,
            "batch": {"sequences": SEQUENCES},
            "save_every_steps": STEPS,
            "objective": {"name": "forward_kl"},
        }
        return Case(student_config(base / "init", data, **(common | changes)), Path(name))

    cases = [case(name, **settings) for name, settings in SETTINGS.items()]
    stopped = replace(case("two, then one"), stop_after=2)
    resumed = case("one, then two")

    def below(folder: Path, *some: Case) -> list[Case]:
        return [replace(one, folder=folder / one.folder) for one in some]

    teacher = InProcessTeacher(tiny_model)
    (half,) = below(base / "many", replace(resumed, stop_after=2))
    half.train(teacher)
    parts, stale_parts = case("parts"), case("stale parts", **SETTINGS["stale"])
    many = start(
        below(
            base / "many",
            *(*cases, resumed, stopped),
            *(replace(parts, stop_after=2), parts),
            *(replace(stale_parts, stop_after=2), stale_parts),
        ),
        WORKERS,
        tiny_model,
        base,
    )
    for one in below(base / "one", *cases):
        one.train(teacher)
    while not many.join():
        pass
    (rest,) = below(base / "many", replace(stopped, stop_after=STEPS))
    rest.train(teacher)
    return base / "one", base / "many"


def exact(row: dict[str, Any]) -> dict[str, float]:
    """What must agree; the divergences of a step are those of some of its rows, other ones for each worker."""
    return {name: value for name, value in row.items() if name in EXACT or name.startswith("heldout/")}


def assert_same_training(one: Path, many: Path, tolerance: float = 1e-5) -> None:
    for left, right in zip(metric_rows(one), metric_rows(many), strict=True):
        assert exact(left) == pytest.approx(exact(right), rel=tolerance, abs=tolerance)
    checkpoints = [folder / f"checkpoints/step-{STEPS:08d}" for folder in (one, many)]
    for file in ("trainer_state.st", "model.safetensors"):
        assert_close(*(load_file(folder / file) for folder in checkpoints), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "bfloat16"])
def test_two_workers_train_what_one_trains(name, folders):
    one, many = folders
    assert_same_training(one / name, many / name)


def test_in_bfloat16_the_losses_agree_as_far_as_it_resolves(folders):
    one, many = (metric_rows(folder / "bfloat16") for folder in folders)
    for left, right in zip(one[1:], many[1:], strict=True):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=0.02)
        assert left["train/tokens"] == right["train/tokens"]


@pytest.mark.parametrize("name", ["one, then two", "two, then one"])
def test_a_checkpoint_goes_on_with_another_number_of_workers(name, folders):
    one, many = folders
    assert_same_training(one / "forward_kl", many / name)


def test_resumed_with_the_same_number_of_workers_it_is_the_undisturbed_training_bit_for_bit(folders):
    many = folders[1]
    for parts, whole in (("parts", "forward_kl"), ("stale parts", "stale")):
        assert metric_rows(many / parts) == metric_rows(many / whole)
        assert_same_training(many / parts, many / whole, tolerance=0.0)


def test_each_worker_writes_its_share_of_the_students_own_sequences(folders):
    rows = metric_rows(folders[1] / "own")
    assert [row["train/own_sequences"] for row in rows[1:]] == [SEQUENCES] * STEPS
    assert all(1 <= row["train/sample_length"] <= 12 for row in rows[1:])


def test_each_worker_asks_the_teacher_for_its_own_share_only(folders):
    """Of five sequences the first worker has three; it alone asks for the held-out ones."""
    scratch = folders[0].parent
    whole = ["forward_kl", "sequence_mean", "bfloat16", "own", "parts", "stale", "stale parts"]
    steps = STEPS * len(whole) + 2 + 1  # Of the stopped training two, of the resumed one the last.
    unused = 3  # Each training that is stopped may have begun one batch more.
    held_out = 4 * len([*whole, "micro_batches", "two, then one"])  # A resumed training finds them on disk.
    assert 2 * steps <= sequences_scored(scratch, 1) <= 2 * (steps + unused)
    assert 3 * steps <= sequences_scored(scratch, 0) - held_out <= 3 * (steps + unused)


def test_more_workers_than_there_are_shares_are_refused(tmp_path):
    batch = {"sequences": 4, "micro_batch_sequences": 2}
    assert student_config(tmp_path, tmp_path, batch=batch, workers=4).workers == 4
    with pytest.raises(ValidationError, match="5 workers, but a batch has 4 parts"):
        student_config(tmp_path, tmp_path, batch=batch, workers=5)
    with pytest.raises(ValidationError, match="3 workers, but a batch has 2 parts"):
        student_config(tmp_path, tmp_path, batch=batch, workers=3, reduction="micro_batch_token_mean")
