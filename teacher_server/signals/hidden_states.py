"""Where hidden states come from: the store, a computation that is under way for another student, or the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tutelage.data.signal_store import sequence_key
from tutelage.errors import Overloaded
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.fair_queue import FairQueue
from tutelage.teacher_server.engine.base import ScoringEngine
from tutelage.teacher_server.signals.store import SignalStore

if TYPE_CHECKING:
    import torch

    from tutelage.teacher_server.signals.unembedding import Unembedding

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(eq=False)
class _Computation:
    task: asyncio.Task[tuple[torch.Tensor, bool]]
    """Gives the states, and whether they were stored."""
    waiting: int = 0
    """Requests that wait for it; without any it is cancelled."""


class HiddenStates:
    """Hidden states of sequences, by the cheapest way there is.

    Args:
        engine: computes them.
        queue: in front of the engine.
        store: keeps them; without one, every request is an engine pass.

    """

    def __init__(self, engine: ScoringEngine, queue: FairQueue, store: SignalStore | None) -> None:
        self._engine, self.queue, self.store = engine, queue, store
        # Reading, hashing and forcing to disk would hold up the event loop, which answers health checks and students.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="signal-store")
        self._under_way: dict[str, _Computation] = {}
        self.engine_passes = 0

    @property
    def waiting(self) -> int:
        """Sequences that wait for the engine."""
        return self.queue.waiting

    @property
    def stored_bytes(self) -> int:
        """Size of the store."""
        return 0 if self.store is None else self.store.bytes

    def describe(self, info: pb.GetTeacherInfoResponse, unembedding: Unembedding) -> None:
        """Has the store say whose states it holds, if there is one."""
        if self.store is not None:
            self.store.describe(info, unembedding)

    def close(self) -> None:
        """Lets another server have the store."""
        self._threads.shutdown()
        if self.store is not None:
            self.store.close()

    async def of(self, token_ids: Sequence[int], counters: pb.StudentUsage) -> torch.Tensor:
        """The final hidden state after each token: [tokens, hidden_size], on the CPU.

        Raises:
            Overloaded: too many requests wait for the engine.
            Unreachable: the engine is dead.

        """
        if self.store is None:
            return await self._compute(token_ids, counters)
        key = sequence_key(token_ids)
        while True:
            shared = key in self._under_way
            if not shared:
                self._begin(key, self._fetch(self.store, token_ids, counters))
            computation = self._under_way[key]
            computation.waiting += 1
            try:
                # Shielded: the student that began it may go away, and the others still wait for it.
                states, stored = await asyncio.shield(computation.task)
            except Overloaded:
                # It stood in the queue on the account of who began it; another student may have room on its own.
                if not shared:
                    raise
                continue
            finally:
                computation.waiting -= 1
                if not computation.waiting and not computation.task.done():
                    computation.task.cancel()
                    self._under_way.pop(key, None)
            counters.store_hits += shared or stored
            return states

    def _begin(self, key: str, fetching: Coroutine[Any, Any, tuple[torch.Tensor, bool]]) -> None:
        computation = _Computation(asyncio.create_task(fetching))
        self._under_way[key] = computation

        def end(_: object) -> None:
            # Before those who wait for it go on, so that whoever tries again begins anew. After a cancellation the
            # key may be another's already.
            if self._under_way.get(key) is computation:
                del self._under_way[key]

        computation.task.add_done_callback(end)

    async def _fetch(
        self, store: SignalStore, token_ids: Sequence[int], counters: pb.StudentUsage
    ) -> tuple[torch.Tensor, bool]:
        stored = await self._in_thread(lambda: store.get(token_ids))
        if stored is not None:
            return stored, True
        states = await self._compute(token_ids, counters)
        try:
            await self._in_thread(lambda: store.put(token_ids, states))
        except OSError as error:  # a full disk costs engine passes, not answers
            logger.warning("cannot store hidden states: %s", error)
        return states, False

    async def _compute(self, token_ids: Sequence[int], counters: pb.StudentUsage) -> torch.Tensor:
        tokens = len(token_ids)
        async with self.queue.admitted(counters.student_id, cost=tokens, size=tokens) as waited_seconds:
            self.engine_passes += 1
            counters.queue_seconds += waited_seconds
            started = time.monotonic()
            states = await self._engine.hidden_states(token_ids)
            counters.service_seconds += time.monotonic() - started
            return states

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)
