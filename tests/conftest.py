"""Models and data that tests share. Models are made once, below `build/` (or TUTELAGE_BUILD_DIR)."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "deploy"))

# A shell's background jobs ignore Ctrl-C, and so do their children; tests send it to themselves and to what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The folders in the order in which their files take longest, so that no long one is begun last.
LONGEST_FIRST = ("cluster", "shared_teacher", "integration", "fault", "contract", "unit", "numerics", "security")

BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with what takes longest, and puts last what ends something that other tests share."""
    items.sort(
        key=lambda item: (
            item.get_closest_marker("last") is not None,
            LONGEST_FIRST.index(item.path.parent.name),
        )
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of the processes of `make test`, one has a file whole, and one has all that ask the shared teacher."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(super()._split_scope(nodeid))
            return str(path.parent if path.parent.name == "shared_teacher" else path)

    return ByFile(config, log)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A tiny Llama with random weights (tests/tiny.py)."""
    from tiny import write_tiny_model
    from tutelage.files import make_directory_once

    return make_directory_once(BUILD / "models" / "tiny", write_tiny_model)


@pytest.fixture(scope="session")
def packaged_models() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct and the student made of its layers."""
    from tutelage.studies.prepare_models import prepare

    return prepare(BUILD / "models")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The research data; tests that ask for it are skipped where it is missing."""
    folder = Path(os.environ.get("TUTELAGE_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no research data at {folder}; set TUTELAGE_DATA_DIR")
    return folder
