"""Models and data that tests share. Models are made once, below `build/` (or TUTELAGE_BUILD_DIR)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "deploy"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))


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
