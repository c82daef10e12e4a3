"""Several scoring engines with the same model as one: a sequence goes to the engine that has the least to do.

vLLM's own `data_parallel_size` does this inside one front end whose processes it places itself. Here each replica
needs cores of its own on a CPU (`cpu_affinity`), and an `AsyncLLM` for each is the way to give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tutelage.teacher_server.engine.lora_adapters import Adapter

if TYPE_CHECKING:
    import torch


class DataParallelScoringEngine:
    """A `ScoringEngine` of engines that are scoring engines themselves; used on the event loop only.

    Args:
        engines: one or more, with the same model and adapters.

    """

    def __init__(self, engines: Sequence[Any]) -> None:
        self._engines = engines
        self._tokens_in_flight = [0] * len(engines)
        self._tokens_so_far = [0] * len(engines)

    @property
    def dead(self) -> bool:
        """Whether one of them is gone."""
        return any(engine.dead for engine in self._engines)

    def shutdown(self) -> None:
        """As `Engine.shutdown`, of all."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda engine: engine.shutdown(), self._engines))

    async def hidden_states(self, token_ids: Sequence[int], adapter: Adapter | None = None) -> torch.Tensor:
        """As `ScoringEngine.hidden_states`; with an adapter, of the model that has it."""
        # Of equally busy engines the one that had less so far, so that each gets some of the first requests.
        rank = min(
            range(len(self._engines)), key=lambda rank: (self._tokens_in_flight[rank], self._tokens_so_far[rank])
        )
        self._tokens_in_flight[rank] += len(token_ids)
        self._tokens_so_far[rank] += len(token_ids)
        try:
            states: torch.Tensor = await self._engines[rank].hidden_states(token_ids, adapter)
        finally:
            self._tokens_in_flight[rank] -= len(token_ids)
        return states
