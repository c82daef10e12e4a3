"""One real teacher for all tests of this folder: starting vLLM costs more than asking it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from teacher_process import TeacherProcess, end, start
from trainer_cohorts import free_port


@pytest.fixture(scope="session")
def metrics_port() -> int:
    """Where the teacher says what it does."""
    return free_port()


@pytest.fixture(scope="session")
def teacher_server(
    packaged_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, metrics_port: int
) -> Iterator[TeacherProcess]:
    """The packaged SmolLM2 teacher, which scores and writes, in its own process."""
    folder = tmp_path_factory.mktemp("teacher")
    options = ("--roles", "score,write", "--max-model-len", "1024", "--metrics-port", str(metrics_port))
    teacher = start(folder, packaged_models[0], *options)
    yield teacher
    end(teacher.process)
