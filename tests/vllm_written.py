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
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.hf_sampler import TransformersSampler
from tutelage.trainer.rollout.vllm_sampler import VllmSampler

VOCABULARY_SIZE = 500  # Of 512 rows.
PROMPTS = [np.arange(start, start + 5 + start % 7, dtype=np.int32) for start in (30, 64, 101, 250)]
BATCH_INDICES = range(len(PROMPTS))


_WARM = 1.7


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


@torch.no_grad()
def largest_logp_gap(student: Student, sampler: VllmSampler, config: StudentConfig, step: int) -> float:
    """Nats between what vLLM says that it drew tokens with, at a temperature of 1.7, and what the student does."""
    warm = config.sampling.model_copy(update={"temperature": _WARM})
    weighed = config.objective.model_copy(update={"importance_weights": True})
    sampler._config = config.model_copy(update={"sampling": warm, "objective": weighed})
    completions = sampler.write(step, BATCH_INDICES, PROMPTS).result()
    sampler._config = config
    gaps = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, completion.ids]).astype(np.int64))
        logits_TV = student.model(ids[None]).logits[0, len(prompt) - 1 : -1, :VOCABULARY_SIZE] / _WARM
        logp_T = logits_TV.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0]
        gaps.append(float((logp_T - torch.from_numpy(completion.logp)).abs().max()))
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
        written = {name: sampler.write(step, BATCH_INDICES, PROMPTS).result() for name, sampler in samplers.items()}
        gaps = {name: largest_gap(student, completions) for name, completions in written.items()}
        stale_gap = None if earlier is None else largest_gap(student, earlier)
        earlier = written["vllm"]
        student.ends = frozenset({int(written["vllm"][0].ids[2])})
        written["ended"] = samplers["vllm"].write(step, BATCH_INDICES, PROMPTS).result()
        lists = {name: [completion.ids.tolist() for completion in completions] for name, completions in written.items()}
        ends, student.ends = sorted(student.ends), frozenset()
        logp_gap = largest_logp_gap(student, samplers["vllm"], config, step)
        found.append(lists | {"end": ends, "gaps": gaps, "stale_gap": stale_gap, "logp_gap": logp_gap})
        take_a_large_step(student)
        samplers["vllm"].take_weights(step + 1)
    output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
