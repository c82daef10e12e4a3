"""Which cores of a CPU each engine computes on, and how the rest of the server stays off them.

vLLM takes an engine's cores from the environment (`VLLM_CPU_OMP_THREADS_BIND`), which is one for all engines that a
process starts; its default, "auto", takes of the cores that the engine's process may use, so two engines would share
one. Here each engine is given its cores by the affinity of the thread that starts it, which its process inherits.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import suppress

import psutil

from tutelage.errors import ConfigurationError
from tutelage.teacher_server.config import Role, TeacherConfig


def cores_of(role: Role, config: TeacherConfig, cores: Sequence[int]) -> list[int]:
    """The cores that an engine computes on, of those that this process may use.

    Each of two roles gets half. One alone leaves the last to the front end, or as many as the head has threads, unless
    several engines share them all with the head.

    Raises:
        ConfigurationError: the configuration names a core that this process may not use.

    """
    wanted = config.score_cores if role == "score" else config.write_cores
    if wanted != "auto":
        ranges = [part.split("-") for part in wanted.split(",")]  # "0-2,5" is 0, 1, 2 and 5
        named = [core for bounds in ranges for core in range(int(bounds[0]), int(bounds[-1]) + 1)]
        if not set(named) <= set(cores):
            raise ConfigurationError(f"given {wanted}, allowed: of {list(cores)}", f"{role}_cores")
        return named
    if len(config.roles) == 1:
        # With several engines the head has no core of its own: 1.55 to 1.62 times vLLM's log-probabilities, against
        # 1.34 to 1.59 with one engine that leaves it a core (docs/teacher.md, "What was measured").
        if role == "score" and config.score_engines * config.processes > 1:
            return list(cores)
        spare = config.head_threads if role == "score" else 1
        return list(cores[:-spare] or cores[:1])
    half = max(1, len(cores) // 2)
    return list(cores[:half] if role == config.roles[0] else cores[half:] or cores)


def shares_of(cores: Sequence[int], engines: int) -> list[list[int]]:
    """The cores of each of several engines, neighbours together, as equal as they can be.

    Raises:
        ConfigurationError: there are more engines than cores.

    """
    if engines > len(cores):
        raise ConfigurationError(f"there are {len(cores)} cores for {engines} processes that compute; each needs one")
    bounds = [index * len(cores) // engines for index in range(engines + 1)]
    return [list(cores[start:end]) for start, end in itertools.pairwise(bounds)]


def keep_off(engines: set[int]) -> None:
    """Moves this process's threads, and all that they will start, to the cores that no engine computes on, if any.

    An engine on a CPU waits at every layer for its slowest core, so work beside it on one costs all of them
    (docs/teacher.md has what keeping off is worth).
    """
    free = os.sched_getaffinity(0) - engines
    if not free:
        return
    for thread in psutil.Process().threads():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread.id, free)
