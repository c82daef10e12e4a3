"""SIGKILL at every place of a training: what goes on afterwards equals an undisturbed training bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars
import pytest
import torch
from safetensors.torch import load_file

from killed_training import FAILPOINTS, fork_server, run_to_the_end_or_the_failpoint
from trainer_cases import metric_rows, student_config, write_rows
from tutelage.trainer.checkpoint.store import CheckpointStore
from tutelage.trainer.config.student import DataConfig, StudentConfig
from tutelage.trainer.model.layer_pruning import prune_layers

# Each writes itself, asks the teacher, adds noise and drops out (LoRA): every failpoint is on its way.
OBJECTIVES = {
    name: {"name": name, "signal": "hidden", "on_policy_fraction": 0.5, "noise": 0.5, "temperature": 2.0}
    for name in ("forward_kl", "reverse_kl", "gkd")
}
SHORT = ("fetch", "sample", "noise", "backward", "step, weights not yet copied", "save: weights", "save: manifest")
TRAINED = {"full": None, "lora": {"r": 4, "lora_dropout": 0.1}}


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    with fork_server(Path(__file__).resolve().parents[1]) as context:
        yield context


@pytest.fixture(scope="module")
def init(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failpoints")
    prune_layers(tiny_model, folder / "init", layers=2)
    write_rows(folder / "rows.jsonl")
    return folder / "init"


def config_of(init: Path, objective: str, trained: str, **changes: Any) -> StudentConfig:
    return student_config(
        init,
        init.parent / "rows.jsonl",
        objective=OBJECTIVES[objective],
        lora=TRAINED[trained],
        batch={"sequences": 2, "micro_batch_sequences": 1, "max_tokens": 64},
        sampling={"max_new_tokens": 3},
        held_out={"sequences": 2, "every_steps": 2},
        **changes,
    )


def assert_equal_trainings(one: Path, other: Path) -> None:
    """Weights, optimizer, the rest of the state, metrics in both forms."""
    left, right = (CheckpointStore(folder / "checkpoints", keep=2).latest() for folder in (one, other))
    assert left is not None
    assert right is not None
    assert left.step == right.step
    names = {path.name for path in left.path.iterdir()}
    assert names == {path.name for path in right.path.iterdir()}
    for name in sorted(name for name in names if name.endswith((".safetensors", ".st"))):
        mine, theirs = load_file(left.path / name), load_file(right.path / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"
    states = [json.loads((path / "state.json").read_text()) for path in (left.path, right.path)]
    assert {**states[0], "metrics_bytes": 0} == {**states[1], "metrics_bytes": 0}  # Times have other lengths.
    assert metric_rows(one) == metric_rows(other)
    frames = [polars.read_parquet(folder / "metrics.parquet") for folder in (one, other)]
    times = [name for name in frames[0].columns if "seconds" in name]
    assert frames[0].drop(times).equals(frames[1].drop(times))


def test_killed_at_one_place_after_another_it_equals_an_undisturbed_one(context, init, tiny_model, tmp_path):
    """One training that is killed at each place, a step later each time, and resumed after each."""
    config = config_of(init, "gkd", "lora", steps=len(SHORT) + 3, save_every_steps=1)
    assert run_to_the_end_or_the_failpoint(context, config, tmp_path / "whole", tiny_model)
    for number, failpoint in enumerate(SHORT, start=1):
        came_to_the_end = run_to_the_end_or_the_failpoint(
            context, config, tmp_path / "killed", tiny_model, failpoint, after_steps=number
        )
        assert not came_to_the_end, failpoint
        latest = CheckpointStore(tmp_path / "killed/checkpoints", keep=2).latest()
        assert number == 1 or (latest is not None and latest.step >= number - 1), failpoint
    assert run_to_the_end_or_the_failpoint(context, config, tmp_path / "killed", tiny_model)
    assert_equal_trainings(tmp_path / "whole", tmp_path / "killed")


def test_killed_over_several_data_sets_it_equals_an_undisturbed_one(context, init, tiny_model, tmp_path):
    turns = ("user", "assistant", "user", "assistant")
    talks = [{"messages": [{"role": role, "content": str(number)} for role in turns]} for number in range(9)]
    (tmp_path / "talks.jsonl").write_text("".join(f"{json.dumps(talk)}\n" for talk in talks))
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "train.jsonl")
    sources = [
        {"path": init.parent / "rows.jsonl", "weight": 2, "template": "plain"},
        {"path": tmp_path / "talks.jsonl"},
        {"path": tmp_path / "folder", "streaming": True, "template": "plain"},
    ]
    config = config_of(init, "gkd", "full", steps=5, save_every_steps=1)
    config = config.model_copy(update={"data": DataConfig.model_validate(sources)})
    assert run_to_the_end_or_the_failpoint(context, config, tmp_path / "whole", tiny_model)
    for number, failpoint in enumerate(("fetch", "backward", "save: manifest"), start=1):
        killed = (config, tmp_path / "killed", tiny_model, failpoint)
        assert not run_to_the_end_or_the_failpoint(context, *killed, after_steps=number)
    assert run_to_the_end_or_the_failpoint(context, config, tmp_path / "killed", tiny_model)
    assert_equal_trainings(tmp_path / "whole", tmp_path / "killed")
    shares = next(row for row in metric_rows(tmp_path / "killed") if row["step"] == 5)
    names = [f"train/share/{label}" for label in ("0-rows", "1-talks", "2-folder")]
    assert sum(shares[name] for name in names) == pytest.approx(1)


@pytest.fixture(scope="module")
def undisturbed(context: Any, init: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Folder of the whole training of an objective, made once."""
    done: dict[tuple[str, str], Path] = {}

    def of(objective: str, trained: str) -> Path:
        if (objective, trained) not in done:
            folder = tmp_path_factory.mktemp(f"{objective}-{trained}")
            config = config_of(init, objective, trained, steps=26, save_every_steps=2)
            assert run_to_the_end_or_the_failpoint(context, config, folder, tiny_model)
            done[objective, trained] = folder
        return done[objective, trained]

    return of


@pytest.mark.long
@pytest.mark.parametrize("failpoint", FAILPOINTS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_once_it_equals_an_undisturbed_one_for_twenty_further_steps(
    objective, trained, failpoint, undisturbed, context, init, tiny_model, tmp_path
):
    whole = undisturbed(objective, trained)
    config = config_of(init, objective, trained, steps=26, save_every_steps=2)
    assert not run_to_the_end_or_the_failpoint(context, config, tmp_path, tiny_model, failpoint, after_steps=5)
    latest = CheckpointStore(tmp_path / "checkpoints", keep=2).latest()
    assert latest is not None
    assert latest.step in (4, 6)
    assert run_to_the_end_or_the_failpoint(context, config, tmp_path, tiny_model)
    assert_equal_trainings(whole, tmp_path)


@pytest.mark.long
def test_a_student_that_writes_with_vllm_goes_on_bit_for_bit(context, init, tiny_model, tmp_path):
    config = config_of(init, "gkd", "full", steps=6, save_every_steps=2)
    config = config.model_copy(update={"sampling": config.sampling.model_copy(update={"engine": "vllm"})})
    assert run_to_the_end_or_the_failpoint(context, config, tmp_path / "whole", tiny_model)
    assert not run_to_the_end_or_the_failpoint(
        context, config, tmp_path / "killed", tiny_model, "step, weights not yet copied", after_steps=3
    )
    assert run_to_the_end_or_the_failpoint(context, config, tmp_path / "killed", tiny_model)
    assert_equal_trainings(tmp_path / "whole", tmp_path / "killed")
