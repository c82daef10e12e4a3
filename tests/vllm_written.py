"""What the vLLM sampler and the transformers sampler write with the same weights, in a process of its own.

    python vllm_written.py MODEL OUTPUT.json

Writes a list with one entry for each of three states of the weights, between which the optimizer made large steps:
completions by `transformers` and by `vllm`, and by `vllm` where `end` would end them; `gaps`, by how many nats their
tokens are less likely to the student than its likeliest at most, and `stale_gap`, the same of what vLLM wrote one state
earlier. float32, nearly greedy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from trainer_cases import student_config
from tutelage.trainer.data.sequences import Completion
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.hf_sampler import TransformersSampler
from tutelage.trainer.rollout.vllm_sampler import VllmSampler

VOCABULARY_SIZE = 500  # Of 512 rows.
PROMPTS = [np.arange(start, start + 5 + start % 7, dtype=np.int32) for start in (30, 64, 101, 250)]
BATCH_INDICES = range(len(PROMPTS))


class EndingStudent(Student):
    """Ends sequences as it is told to."""

    ends: frozenset[int] = frozenset()

    @property
    def end_ids(self) -> frozenset[int]:
        return self.ends


def take_a_large_step(student: Student) -> None:
    ids = torch.tensor(np.concatenate(PROMPTS).astype(np.int64))[None]
    student.model(ids, labels=ids).loss.backward()
    student.collect_gradients()
    student.step(1e-2)


@torch.no_grad()
def largest_gap(student: Student, completions: list[Completion]) -> float:
    """Nats between a token that was written and the likeliest one, at most."""
    gaps = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion.ids]).astype(np.int64))
        logits_TV = student.model(ids[None]).logits[0, len(prompt) - 1 : -1, :VOCABULARY_SIZE]
        written_T = logits_TV.gather(1, ids[len(prompt) :, None])[:, 0]
        gaps.append(float((logits_TV.amax(1) - written_T).max()))
    return max(gaps)


def main(model: Path, output: Path) -> None:
    config = student_config(
        model,
        Path("unused"),
        dtype="float32",
        sampling={"engine": "vllm", "temperature": 0.01, "max_new_tokens": 24},
    )
    student = EndingStudent(model, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=VOCABULARY_SIZE)
    samplers = {"transformers": TransformersSampler(config, student), "vllm": VllmSampler(config, student)}
    found = []
    earlier = None
    for step in range(3):
        student.ends = frozenset()
        written = {name: sampler.generate(step, BATCH_INDICES, PROMPTS) for name, sampler in samplers.items()}
        gaps = {name: largest_gap(student, completions) for name, completions in written.items()}
        stale_gap = None if earlier is None else largest_gap(student, earlier)
        earlier = written["vllm"]
        student.ends = frozenset({int(written["vllm"][0].ids[2])})
        written["ended"] = samplers["vllm"].generate(step, BATCH_INDICES, PROMPTS)
        lists = {name: [completion.ids.tolist() for completion in completions] for name, completions in written.items()}
        found.append(lists | {"end": sorted(student.ends), "gaps": gaps, "stale_gap": stale_gap})
        take_a_large_step(student)
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
