"""Processes of a cluster work in the folder of the command that they run for, so that relative paths mean the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def runtime_env() -> dict[str, Any]:
    """Ray's for a job that is started in the present folder."""
    return {"worker_process_setup_hook": _entering(str(Path.cwd()))}


def _entering(folder: str) -> Callable[[], None]:
    """What Ray calls in each process of that job before anything else; it would begin in the folder of its node."""

    # Defined here, and so pickled by value: a node on which this package cannot be imported is to say so by itself.
    def enter() -> None:
        # Where a node has no such folder, a relative path is refused as one that is missing; absolute ones need none.
        with suppress(OSError):
            os.chdir(folder)

    return enter
