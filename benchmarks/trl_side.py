"""TRL's side of a comparison: on-policy distillation with both models in one process, a step a line of stdin.

Runs in the environment of `trl_environment.py`. Prints one JSON object when it is ready and one after each step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

# What TRL prints must not reach the line protocol.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(**values: Any) -> None:
    """One line for whoever asked."""
    print(json.dumps(values), file=_answers, flush=True)


class OnCommand(TrainerCallback):
    """Waits for a line before each step and answers after it; what a step generates, it generates in between."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Waits, then starts the clock."""
        if not sys.stdin.readline():
            os._exit(0)
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer."""
        answer(seconds=time.perf_counter() - self._started)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Both models are loaded."""
        answer(ready=True)


def trainer(options: argparse.Namespace, output: str) -> DistillationTrainer:
    """TRL's trainer on the given prompts, without checkpointing of activations, which would only cost it time."""
    dtype = {"dtype": options.dtype}
    settings = DistillationConfig(
        output_dir=output,
        model_init_kwargs=dtype,
        teacher_model_init_kwargs=dict(dtype),
        beta=0.5,
        max_completion_length=options.new_tokens,
        per_device_train_batch_size=options.batch,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        learning_rate=1e-6,
        max_steps=10_000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    rows = [json.loads(line) for line in options.prompts.read_text().splitlines()]
    return DistillationTrainer(
        model=str(options.student),
        teacher_model=str(options.teacher),
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]),
        callbacks=[OnCommand()],
    )


def main() -> None:
    """Trains until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL with `prompt`")
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as output:
        trainer(options, output).train()


if __name__ == "__main__":
    main()
