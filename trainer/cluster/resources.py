"""Whether a cluster has what a student asks for. Ray itself waits for what is not there without a word."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.data.hub import local_model
from tutelage.trainer.config.student import StudentConfig

_BASE_BYTES = 80 * 2**20
_BYTES = {"float32": 4, "bfloat16": 2}
Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU."""


def processes_of(student: StudentConfig) -> list[Resources]:
    """What each process of a student asks for: its own, or its workers, and then its writers."""
    writers = student.sampling.writers
    return [_asked(student.threads, student.gpus)] * student.workers + (
        [_asked(writers.threads, writers.gpus)] * writers.count if writers else []
    )


def _asked(cpus: int, gpus: float) -> Resources:
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def fits(student: StudentConfig, nodes: Sequence[Resources]) -> bool:
    """Whether every process of a student finds a node with what it asks for.

    Args:
        student: of one process, or several, which may be on several nodes.
        nodes: what each has; the free part of it, or all.

    """
    left = [dict(node) for node in nodes]
    # The largest first, as Ray does with a placement group: a small one may go beside it, or elsewhere.
    for asked in sorted(processes_of(student), key=lambda each: (each.get("GPU", 0.0), each["CPU"]), reverse=True):
        place = next((node for node in left if all(node.get(name, 0.0) >= n for name, n in asked.items())), None)
        if place is None:
            return False
        for name, amount in asked.items():
            place[name] -= amount
    return True


def in_words(resources: Resources) -> str:
    """For example "1 GPU and 2 CPUs"; GPUs first, and nothing of what a person did not ask for."""
    parts = [
        f"{resources[name]:g} {name}{'s' * (resources[name] != 1)}" for name in ("GPU", "CPU") if name in resources
    ]
    return " and ".join(parts) or "neither CPUs nor GPUs"


def asked_in_words(student: StudentConfig) -> str:
    """For example "1 CPU, and 1 GPU and 4 CPUs for each of 2 writers"."""
    own, writers = processes_of(student), student.sampling.writers
    each = f" for each of {student.workers} processes" if student.workers > 1 else ""
    text = f"{in_words(own[0])}{each}"
    if writers:
        each = f" for each of {writers.count} writers" if writers.count > 1 else " for its writer"
        text += f", and {in_words(own[-1])}{each}"
    return text


def shortage(student: StudentConfig, nodes: Sequence[Resources]) -> str:
    """What is asked, what is there, what to do; for people."""
    settings = "gpus, threads, workers" + (", sampling.writers" if student.sampling.writers else "")
    there = "; ".join(in_words(node) for node in nodes) or "no node"
    return (
        f"{student.id} asks for {asked_in_words(student)} ({settings}), which the cluster has not: {there}; ask for "
        "less, or run it where that is"
    )


def object_store_bytes(students: Sequence[StudentConfig]) -> int:
    """Shared memory of a local cluster: what the weights take that students hand to their writers, and 80 MiB.

    Of each student the versions of the batches that are begun, the one that is being made, and one for each writer,
    which keeps what it wrote with last.
    """
    return _BASE_BYTES + sum(
        _handed_over_bytes(student) * (student.sampling.max_staleness + 2 + student.sampling.writers.count)
        for student in students
        if student.sampling.writers is not None
    )


def _handed_over_bytes(student: StudentConfig) -> int:
    """Of one version of what a step changes."""
    numbers, lora = 0, student.lora
    for name, shape in _shapes(local_model(student.start, "init")):
        if lora is None:
            numbers += math.prod(shape)
        elif any(name == f"{target}.weight" or name.endswith(f".{target}.weight") for target in lora.target_modules):
            numbers += lora.r * sum(shape)
    return numbers * _BYTES[student.dtype]


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """The names and shapes of a model's weights, read from the headers of its files, which were checked before."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")
