"""Every random number of a run comes from here: one seed per (run's seed, what for, where).

A generator is made anew for each step and purpose, so none carries a state that a checkpoint would have
to keep, and a resumed step draws what the undisturbed one would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derived_seed(seed: int, purpose: str, *parts: str | int) -> int:
    """A seed in [0, 2⁶³) from the run's seed, a purpose such as `sampling`, and e.g. student and step."""
    text = "\0".join(str(part) for part in (seed, purpose, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def numpy_generator(seed: int, purpose: str, *parts: str | int) -> np.random.Generator:
    """A numpy generator with the derived seed."""
    return np.random.Generator(np.random.PCG64(derived_seed(seed, purpose, *parts)))
