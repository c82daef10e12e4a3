"""One real teacher for all tests of this folder: starting vLLM costs more than asking it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from teacher_process import TeacherProcess, end, start


@pytest.fixture(scope="session")
def teacher_server(
    packaged_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TeacherProcess]:
    """The packaged SmolLM2 teacher, which scores and writes, in its own process."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher = start(folder, packaged_models[0], "--roles", "score,write", "--max-model-len", "1024")
    yield teacher
    end(teacher.process)
