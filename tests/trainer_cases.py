"""Small trainings that tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tutelage.trainer.config.student import StudentConfig


def write_rows(path: Path, count: int = 40) -> Path:
    """A data set of sums, with completions."""
    rows = [
        {"prompt": f"Ann has {i} apples and buys {i % 7} more.", "completion": f" She has {i + i % 7}."}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def student_config(init: Path, data: Path, **changes: Any) -> StudentConfig:
    """A student that takes a few seconds."""
    values: dict[str, Any] = {
        "id": "ann",
        "init": init,
        "data": {"path": data},
        "batch": {"sequences": 4, "micro_batch_sequences": 2, "max_tokens": 96},
        "sampling": {"max_new_tokens": 12},
        "held_out": {"sequences": 4, "every_steps": 3},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "steps": 6,
        "save_every_steps": 3,
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return StudentConfig.model_validate(values)


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a student, without those that are times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
