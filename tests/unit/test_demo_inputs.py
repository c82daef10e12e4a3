"""The demonstration's rows and items, and what is cut out of its teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tutelage.data.overlap import overlaps
from tutelage.evaluator.tasks.custom import read_task
from tutelage.studies.demo_inputs import ITEMS, TRAIN_ROWS, write_inputs
from tutelage.trainer.model.layer_pruning import prune_layers


def test_no_number_of_an_item_is_in_a_training_row(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    task = read_task(tmp_path / "numbers.yaml")
    items = task.items(None)
    assert (len({row["question"] for row in rows}), len({item.item_hash for item in items})) == (TRAIN_ROWS, ITEMS)
    trained = {number for row in rows for number in re.findall(r"\d+", row["question"])}
    assert trained.isdisjoint(item.target for item in items)
    assert all(item.target in item.instruction for item in items)
    texts = [(row["question"], [row["question"], row["answer"]]) for row in rows]
    found = overlaps({"numbers": [item.instruction for item in items]}, texts)["numbers"]
    assert (found.items, found.exact, found.shared) == (ITEMS, 0, 0)


def test_layers_that_are_named_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    prune_layers(tiny_model, tmp_path, layers=[0, 2, 3])
    whole, cut = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_model, tmp_path))
    assert cut.config.num_hidden_layers == 3
    for index, kept in enumerate((0, 2, 3)):
        own, first = cut.model.layers[index], whole.model.layers[kept]
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), first.parameters(), strict=True))
