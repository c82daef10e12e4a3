"""Processes of a cluster work in the folder of the command that they run for, so that relative paths mean the same."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

_VARIABLE = "TUTELAGE_WORKING_FOLDER"


def runtime_env() -> dict[str, Any]:
    """Ray's for a job that is started in the present folder."""
    return {"env_vars": {_VARIABLE: str(Path.cwd())}, "worker_process_setup_hook": f"{__name__}.enter"}


def enter() -> None:
    """What Ray calls in each process of that job before anything else; it would begin in the folder of its node."""
    # Where a node has no such folder, a relative path is refused as one that is missing; absolute ones do not need it.
    with suppress(FileNotFoundError):
        os.chdir(os.environ[_VARIABLE])
