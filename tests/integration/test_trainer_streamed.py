"""Scoring while the student writes changes no number: losses and weights are, bit for bit, those of scoring later."""

from __future__ import annotations

from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer_cases import metric_rows, student_config, write_rows
from trainer_doubles import InProcessTeacher
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.teacher.streamed import StreamedScoring
from tutelage.trainer.training.loop import train

BLOCK, LONGEST = 8, 96
OWN = {"name": "gkd", "on_policy_fraction": 1.0}


class ExactTeacher(InProcessTeacher):
    """A row has the same bits however long the sequence is that it is asked with; says that it reuses prefixes."""

    def __init__(self, folder: Path, block_tokens: int = BLOCK) -> None:
        super().__init__(folder)
        self.identity = replace(self.identity, block_tokens=block_tokens)
        self.pieces = 0

    def score(self, sequences, spec):
        self.pieces += sum(
            sequence.end == len(sequence.ids) - 1 and sequence.end % BLOCK == 0 for sequence in sequences
        )
        return super().score(sequences, spec)

    def signals(self, sequence, spec):
        # Products of other sizes are summed in another order: of all sequences, LONGEST rows are computed.
        padding = np.zeros(LONGEST + 1 - len(sequence.ids), np.int32)
        all_rows = replace(sequence, ids=np.concatenate([sequence.ids, padding]), start=0, end=LONGEST)
        rows = slice(sequence.start, sequence.end)
        return {name: array[rows] for name, array in super().signals(all_rows, spec).items()}


def rollout(row, generate, tokenizer):
    """Writes, is answered, writes on, and drops the last token."""
    first = generate(row.prompt_ids)
    told = [5, 6, 7]
    second = generate([*row.prompt_ids, *first, *told])
    return [*first, *told, *second[:-1]], [True] * len(first) + [False] * 3 + [True] * (len(second) - 1)


CASES = {
    "hidden": {"objective": OWN},
    "topk, half of it the data's": {
        "objective": {"name": "forward_kl", "signal": "topk", "k": 8, "on_policy_fraction": 0.5}
    },
    "several completions, older weights": {
        "objective": OWN,
        "sampling": {"completions": 2, "max_staleness": 1, "max_new_tokens": 24},
    },
    "loss on the prompt": {"objective": OWN, "loss_on_prompt": True},
    "a rollout of several turns": {
        "objective": OWN,
        "sampling": {"rollout": f"{__name__}:rollout", "max_new_tokens": 12},
    },
    "another prompt": {"objective": OWN, "teacher_system": "Be short."},
}


QUICK = ("hidden", "topk, half of it the data's", "a rollout of several turns")


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("streamed")
    prune_layers(tiny_model, base / "init", layers=2)
    return base / "init", write_rows(base / "rows.jsonl")


def trained(folder: Path, teacher, folders, *, stream: bool, teacher_system: str | None = None, **changes):
    settings = {"steps": 3, "save_every_steps": 2, "dtype": "float32", "held_out": {"sequences": 0}, **changes}
    settings["sampling"] = {"max_new_tokens": 24, **settings.get("sampling", {}), "stream": stream}
    config = student_config(*folders, **settings)
    data = config.data.model_copy(update={"teacher_system": teacher_system})
    config = config.model_copy(update={"data": data})
    return train(config, folder=folder, teacher=teacher).checkpoint


def same_weights(left: Path, right: Path) -> None:
    for name in ("model.safetensors", "trainer_state.st"):
        one, other = load_file(left / name), load_file(right / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def test_losses_and_weights_are_the_same_bit_for_bit(name, folders, tiny_model, tmp_path, monkeypatch):
    piece = StreamedScoring.piece

    def and_wait(scoring, *told, **named):
        piece(scoring, *told, **named)
        wait(scoring._calls)  # A tiny student is done before a busy machine has begun to score.

    monkeypatch.setattr(StreamedScoring, "piece", and_wait)
    meanwhile, afterwards = ExactTeacher(tiny_model), ExactTeacher(tiny_model)
    one = trained(tmp_path / "meanwhile", meanwhile, folders, stream=True, **CASES[name])
    other = trained(tmp_path / "afterwards", afterwards, folders, stream=False, **CASES[name])
    assert meanwhile.pieces > 3
    assert metric_rows(tmp_path / "meanwhile") == metric_rows(tmp_path / "afterwards")
    same_weights(one, other)
