"""A task in two halves, and what a model knows of them: sums for one teacher, differences for the other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tutelage.data.dataset_files import read_examples


def write_halves(folder: Path) -> dict[str, Path]:
    """`sums`, `differences` and `both`, whose rows name their teacher, as files of 240, 240 and 480 rows."""
    pairs = [(first, second) for first in range(10, 40) for second in range(1, 9)]
    sums = [(f"Ann has {a} apples and buys {b} more.", f" She has {a + b}.") for a, b in pairs]
    differences = [(f"Ann has {a} apples and eats {b} now.", f" She has {a - b}.") for a, b in pairs]
    halves = {
        name: [{"prompt": prompt, "completion": completion, "teacher": name} for prompt, completion in rows]
        for name, rows in (("sums", sums), ("differences", differences))
    }
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in halves.items()}
    files = {name: folder / f"{name}.jsonl" for name in (*texts, "both")}
    for name, path in files.items():
        path.write_text(texts.get(name) or "".join(texts.values()), encoding="utf-8")
    return files


def answers_right(model: Path, data: Path) -> Sequence[bool]:
    """For each row whether the model, decoding greedily, gives the completion."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    right = []
    for example in read_examples(data, AutoTokenizer.from_pretrained(model), template="chat"):
        ids = np.concatenate([example.prompt_ids, example.completion_ids]).astype(np.int64)
        with torch.no_grad():
            likeliest = language_model(torch.from_numpy(ids)[None]).logits[0].argmax(-1).numpy()
        # Greedy decoding gives the completion exactly if each of its tokens is the likeliest after those before it.
        right.append(bool((likeliest[len(example.prompt_ids) - 1 : -1] == example.completion_ids).all()))
    return right
