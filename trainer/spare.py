"""A process in which a student's imports are done: Ray gives it to the next student that needs one.

Importing torch and transformers takes longer than everything else that stands between the death of a student's process
and its next step. So one idle process of Ray's pool imports them ahead, and when a student starts in it, another does.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any


class Spare:
    """Keeps one such process; needs a connected Ray with an unreserved CPU, or Ray ends what is idle."""

    def __init__(self) -> None:
        self._future: Any = None

    def renew(self, taken: Collection[int]) -> None:
        """Begins with another process if there is none yet, or the last one is among those that students have taken."""
        import ray

        if self._future is not None:
            ready, _ = ray.wait([self._future], timeout=0)
            if not ready or ray.get(self._future) not in taken:
                return
        # Without CPUs of its own: it must not wait for a student to end.
        self._future = ray.remote(num_cpus=0, max_retries=0)(_import_all).remote()


def _import_all() -> int:
    """Runs in the process that becomes the spare one; returns its id."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import trainer.loop
    import trainer.services  # noqa: F401

    return os.getpid()
