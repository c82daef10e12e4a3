"""One real teacher for all integration tests: starting vLLM costs more than asking it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from teacher_process import TeacherProcess, running


@pytest.fixture(scope="session")
def teacher_server(
    packaged_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TeacherProcess]:
    """The packaged SmolLM2 teacher, which scores and writes, in its own process."""
    folder = tmp_path_factory.mktemp("teacher")
    with running(folder, packaged_models[0], "--roles", "score,write", "--max-sequence-tokens", "1024") as teacher:
        yield teacher
