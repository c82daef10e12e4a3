"""Whether a cluster has what a student asks for. Ray itself waits for what is not there without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tutelage.trainer.config.student import StudentConfig

Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU."""


def asked_of(student: StudentConfig) -> Resources:
    """What each process of a student asks for."""
    return {"CPU": student.threads} | ({"GPU": student.gpus} if student.gpus else {})


def fits(student: StudentConfig, nodes: Sequence[Resources]) -> bool:
    """Whether every process of a student finds a node with what it asks for.

    Args:
        student: of one process, or several, which may be on several nodes.
        nodes: what each has; the free part of it, or all.

    """
    asked, left = asked_of(student), [dict(node) for node in nodes]
    for _ in range(student.workers):
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


def shortage(student: StudentConfig, nodes: Sequence[Resources]) -> str:
    """What is asked, what is there, what to do; for people."""
    each = f" for each of {student.workers} processes" if student.workers > 1 else ""
    there = "; ".join(in_words(node) for node in nodes) or "no node"
    return (
        f"{student.id} asks for {in_words(asked_of(student))}{each} (gpus, threads, workers), which the cluster has "
        f"not: {there}; ask for less, or run it where that is"
    )
