"""Several scoring engines with the same model as one: a sequence goes to the engine that will be done with it first.

vLLM's own `data_parallel_size` does this inside one front end whose processes it places itself. Here each replica
needs cores of its own on a CPU (`cpu_affinity`), and an `AsyncLLM` for each is the way to give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tutelage.teacher_server.engine.base import ComputedStates
from tutelage.teacher_server.engine.lora_adapters import Adapter
from tutelage.teacher_server.engine.prefix_memory import PrefixMemory

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class DataParallelScoringEngine:
    """A `ScoringEngine` of engines that are scoring engines themselves; used on the event loop only.

    Args:
        engines: one or more, with the same model and adapters.

    """

    def __init__(self, engines: Sequence[Any]) -> None:
        self._engines = engines
        self._tokens_in_flight = [0] * len(engines)
        self._tokens_so_far = [0] * len(engines)
        self._memories = [PrefixMemory(engine.block_tokens, engine.cache_tokens) for engine in engines]

    @property
    def dead(self) -> bool:
        """Whether one of them is gone."""
        return any(engine.dead for engine in self._engines)

    @property
    def block_tokens(self) -> int:
        """As `ScoringEngine.block_tokens`."""
        return int(self._engines[0].block_tokens)

    @property
    def cache_tokens(self) -> int:
        """As `ScoringEngine.cache_tokens`, of all together."""
        return sum(engine.cache_tokens for engine in self._engines)

    @property
    def batch_tokens(self) -> int:
        """As `ScoringEngine.batch_tokens`, of each."""
        return int(self._engines[0].batch_tokens)

    @property
    def max_model_len(self) -> int:
        """As `Engine.max_model_len`."""
        return min(int(engine.max_model_len) for engine in self._engines)

    def metrics(self) -> Iterable[Metric]:
        """As `Engine.metrics`, of each."""
        return (metric for engine in self._engines for metric in engine.metrics())

    def shutdown(self) -> None:
        """As `Engine.shutdown`, of all."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda engine: engine.shutdown(), self._engines))

    async def hidden_states(
        self, token_ids: Sequence[int], first: int = 0, salt: str = "", adapter: Adapter | None = None
    ) -> ComputedStates:
        """As `ScoringEngine.hidden_states`; with an adapter, of the model that has it."""
        prefix_salt = salt if adapter is None else f"{adapter.name} {salt}"
        to_do = [len(token_ids) - min(first, memory.known(token_ids, prefix_salt)) for memory in self._memories]
        # A prefix stays with the engine that has it, unless that one is so far behind that another is done before it.
        # Of equals the one that had less so far, so that each gets some of the first requests.
        rank = min(
            range(len(self._engines)),
            key=lambda rank: (self._tokens_in_flight[rank] + to_do[rank], self._tokens_so_far[rank]),
        )
        self._memories[rank].note(token_ids, prefix_salt)
        self._tokens_in_flight[rank] += to_do[rank]
        self._tokens_so_far[rank] += to_do[rank]
        try:
            states: ComputedStates = await self._engines[rank].hidden_states(token_ids, first, salt, adapter)
        finally:
            self._tokens_in_flight[rank] -= to_do[rank]
        return states
