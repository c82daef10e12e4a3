"""Tiny models that are taught a behaviour, and what share of prompts they then show it for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer_cases import student_config
from trainer_doubles import InProcessTeacher
from tutelage.decoding import decode
from tutelage.trainer.training.loop import train

BATCH = {"sequences": 16, "micro_batch_sequences": 16, "max_tokens": 128}


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(init: Path, data: Path, folder: Path, *, teacher: Path | None = None, **changes: Any) -> Path:
    """The checkpoint of a short training in float32."""
    settings = {
        "batch": BATCH,
        "dtype": "float32",
        "held_out": {"sequences": 0},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5},
    }
    source = changes.pop("source", {})
    config = student_config(init, data, **settings | changes)
    config = config.model_copy(update={"data": config.data.model_copy(update=source)})
    done = train(config, folder=folder, teacher=None if teacher is None else InProcessTeacher(teacher))
    assert done.checkpoint is not None
    return done.checkpoint


@torch.inference_mode()
def answers(model: Path, prompts: Sequence[str], most: int = 24) -> list[str]:
    """What a model says greedily after each text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    written = decode(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(),
        [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts],
        next_ids=lambda logits_BV, _rows: logits_BV.argmax(-1),
        room=[most] * len(prompts),
        end_ids=frozenset({tokenizer.eos_token_id}),
    )
    return [tokenizer.decode(ids) for ids in written]


def share(found: Sequence[str], shows: Callable[[int, str], bool]) -> float:
    return sum(shows(index, text) for index, text in enumerate(found)) / len(found)
