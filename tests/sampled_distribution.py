"""Is what a sampler draws distributed as the student says? Chi-square against exact probabilities.

    python tests/sampled_distribution.py MODEL OUTPUT.json

The vocabulary is the first `VOCABULARY_SIZE` ids of the model's, so that all continuations of `TOKENS` tokens can be
counted. As a script, which vLLM needs: p-values of what vLLM draws in this process and in writers, for a student that
is trained in full and ones with adapters, after two large steps; and of the same draws against the student before them.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2

from trainer_cases import student_config
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.model.student import Student

VOCABULARY_SIZE, TOKENS, SEQUENCES = 8, 2, 64
PROMPT = np.array([1, 5, 3, 7, 4], np.int32)
_LEAST_EXPECTED = 5.0
"""Draws of a cell (Cochran 1954); rarer ones are counted together."""


def config_of(init: Path, **changes: Any) -> StudentConfig:
    """Of a student that writes `TOKENS` tokens."""
    sampling = {"max_new_tokens": TOKENS} | changes.pop("sampling", {})
    own = {"name": "gkd", "on_policy_fraction": 1.0}
    return student_config(
        init, Path("unused"), objective=own, batch={"sequences": SEQUENCES}, sampling=sampling, **changes
    )


def student_of(config: StudentConfig) -> Student:
    """It, before its first step."""
    torch.set_num_threads(1)
    return Student(
        config.init, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=VOCABULARY_SIZE, lora=config.lora
    )


def take_large_steps(student: Student) -> None:
    """Two of them."""
    ids_1T = torch.arange(64)[None] * 7 % VOCABULARY_SIZE
    for _ in range(2):
        student.model(ids_1T, labels=ids_1T).loss.backward()
        student.collect_gradients()
        student.step(3e-3)


@torch.no_grad()
def exact(student: Student) -> dict[tuple[int, ...], float]:
    """The probability of each continuation, from logits of whole sequences."""
    probabilities, begun = {}, {(): 1.0}
    student.model.eval()
    for length in range(TOKENS):
        longer = {}
        for written, mass in begun.items():
            ids_1T = torch.tensor([[*PROMPT.tolist(), *written]])
            p_V = student.model(ids_1T).logits[0, -1, :VOCABULARY_SIZE].double().softmax(-1).tolist()
            for token, p in enumerate(p_V):
                ends = token in student.end_ids or length == TOKENS - 1
                (probabilities if ends else longer)[*written, token] = mass * p
        begun = longer
    student.model.train()
    return probabilities


def drawn(sampler: Any, batches: int) -> Counter[tuple[int, ...]]:
    """How often each continuation was drawn."""
    counts: Counter[tuple[int, ...]] = Counter()
    for step in range(1, batches + 1):
        written = sampler.write(step, range(SEQUENCES), [PROMPT] * SEQUENCES).result()
        counts.update(tuple(each.ids.tolist()) for each in written)
    return counts


def p_value(counts: Mapping[tuple[int, ...], int], probabilities: Mapping[tuple[int, ...], float]) -> float:
    """Of Pearson's chi-square test: how often so large a deviation comes about if these are the probabilities."""
    draws = sum(counts.values())
    assert math.isclose(sum(probabilities.values()), 1.0)
    assert counts.keys() <= probabilities.keys()
    cells: list[tuple[float, int]] = []
    rare = (0.0, 0)
    for continuation, p in probabilities.items():
        cell = (p * draws, counts.get(continuation, 0))
        if cell[0] >= _LEAST_EXPECTED:
            cells.append(cell)
        else:
            rare = (rare[0] + cell[0], rare[1] + cell[1])
    cells += [rare] if rare[0] else []
    statistic = sum((count - expected) ** 2 / expected for expected, count in cells)
    return float(chi2.sf(statistic, len(cells) - 1))


def judged(
    counts: Mapping[tuple[int, ...], int], student: Student, before: Mapping[tuple[int, ...], float]
) -> dict[str, float]:
    """p-values of draws against the student as it is, and as it was before its steps."""
    return {
        "p": p_value(counts, exact(student)),
        "p_before": p_value(counts, before),
        "sequences": sum(counts.values()),
    }


def main(model: Path, output: Path) -> None:
    from local_ray import local_ray
    from tutelage.trainer.rollout.base import open_sampler

    found = {}
    with tempfile.TemporaryDirectory() as temporary, local_ray(Path(temporary)):
        # With adapters vLLM computes in float32: the student that does so as well tells that from bfloat16's rounding.
        for kind, lora, dtype in (
            ("full", None, "bfloat16"),
            ("lora", {"r": 4}, "bfloat16"),
            ("float32 lora", {"r": 4}, "float32"),
        ):
            for where, sampling in (
                ("in process", {"engine": "vllm"}),
                ("writer", {"writers": {"engine": "vllm"}, "max_staleness": 1000}),
            ):
                config = config_of(model, lora=lora, dtype=dtype, sampling=sampling)
                student = student_of(config)
                before, sampler = exact(student), open_sampler(config, student)
                sampler.take_weights(0)
                take_large_steps(student)
                sampler.take_weights(1)
                found[f"{kind}, {where}"] = judged(drawn(sampler, 40), student, before)
                sampler.close()
                output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
