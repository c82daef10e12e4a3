"""A study of a few seconds that tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from trainer_cases import write_rows


def study_values(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Two fine-tunings of a tiny model, scored on one task, without a teacher."""
    rows = [{"question": f"{i} plus {i}?", "answer": str(2 * i)} for i in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "sums", "data": "sums.jsonl", "question": "{question}", "answer": "{answer}"}
    (folder / "sums.yaml").write_text(yaml.safe_dump(task | {"extraction": "number", "max_new_tokens": 8}))
    values = {
        "name": "tiny",
        "output": str(folder / "run"),
        "models": {"tiny": {"path": str(model), "parameters": 900_000, "hidden_size": 128}},
        "students": ["tiny"],
        "data": str(write_rows(folder / "train.jsonl")),
        "seeds": [0, 1],
        "settings": {
            "steps": 6,
            "save_every_steps": 2,
            "batch": {"sequences": 4, "micro_batch_sequences": 4, "max_tokens": 96},
            "held_out": {"sequences": 4, "every_steps": 6},
        },
        "methods": {"sft": {"objective": {"name": "sft"}}, "kd": {"objective": {"name": "forward_kl"}}},
        "grid": [{"methods": ["sft"]}],
        "evaluation": {
            "tasks": [{"task": str(folder / "sums.yaml")}],
            "serve": {"prompt": "chat", "engine": "transformers"},
        },
    }
    return values | changes


def write_study(folder: Path, model: Path, **changes: Any) -> Path:
    """The same as a file."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study_values(folder, model, **changes)))
    return path
