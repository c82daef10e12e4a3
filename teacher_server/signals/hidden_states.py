"""Where hidden states come from: the store, a computation that is under way for another student, or the engine.

A sequence is computed in pieces of one batch, each of which reads what the engine has cached of the pieces before it.
So a long sequence holds up a short one for a batch and not for its length, its states are held a piece at a time, and
a sequence that is asked for again when it has grown is one more piece.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tutelage.data.signal_store import Prefixes, sequence_key
from tutelage.errors import Overloaded
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.fair_queue import FairQueue
from tutelage.teacher_server.engine.base import ComputedStates, ScoringEngine
from tutelage.teacher_server.engine.prefix_memory import PrefixMemory
from tutelage.teacher_server.signals.store import SignalStore

if TYPE_CHECKING:
    import torch

    from tutelage.teacher_server.signals.unembedding import Unembedding

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Passes that computed what they should have read, after which the rest of a sequence is computed at once.
_PASSES_THAT_DO_NOT_PAY = 2
# A student that asked so lately is held up by the pieces of others.
_NEIGHBOUR_SECONDS = 1.0
# A piece may take as many times as long as a batch takes by itself: another's may be computed before it. Beyond, it is
# shortened, to a part of a batch at least, because each pass over a long sequence has costs of its own.
_BATCHES_A_PIECE_MAY_TAKE, _SHORTEST_PIECE = 4, 1 / 4


@dataclass(eq=False)
class _Computation:
    task: asyncio.Task[ComputedStates]
    waiting: int = 0
    """Requests that wait for it; without any it is cancelled."""


@dataclass(eq=False)
class _Request:
    """One sequence on its way through the engine."""

    sequence: Prefixes
    counters: pb.StudentUsage
    salt: str
    begun: bool = False
    """Whether a piece of it was admitted already: the others are not refused."""
    seconds_a_token: float = 0.0
    """That its last pass took."""
    passes_that_did_not_pay: int = 0


class HiddenStates:
    """Hidden states of sequences, by the cheapest way there is.

    Args:
        engine: computes them.
        queue: in front of the engine.
        store: keeps them; without one, only the engine's cache does.

    """

    def __init__(self, engine: ScoringEngine, queue: FairQueue, store: SignalStore | None) -> None:
        self._engine, self.queue, self.store = engine, queue, store
        # Reading, hashing and forcing to disk would hold up the event loop, which answers health checks and students.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="signal-store")
        self._under_way: dict[tuple[str, str], _Computation] = {}
        self._memory = PrefixMemory(engine.block_tokens, engine.cache_tokens)
        self._fewest_seconds_a_token = math.inf  # of a batch that was half full at least
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

    async def of(
        self, token_ids: Sequence[int], start: int, end: int, counters: pb.StudentUsage, salt: str = ""
    ) -> AsyncGenerator[torch.Tensor]:
        """The final hidden states after tokens `start` … `end`-1, in order, a piece at a time.

        Tokens from `end` on are not computed; nor are those before `start`, as far as the engine has them cached.

        Args:
            token_ids: the sequence.
            start: first position, 0 … end-1.
            end: one past the last.
            counters: of the student on whose account it is computed.
            salt: only what was computed with the same salt is shared.

        Yields:
            [rows, hidden_size], on the CPU.

        Raises:
            Overloaded: too many requests wait for the engine.
            Unreachable: the engine is dead.

        """
        sequence = Prefixes(token_ids)
        request = _Request(sequence, counters, salt)
        computed_for_it = False
        while start < end:
            piece_end = min(end, self._end_of_piece(request, start))
            states, computed = await self._piece(request, start, piece_end)
            computed_for_it |= computed
            yield states
            start = piece_end
        counters.store_hits += not computed_for_it

    async def _piece(self, request: _Request, start: int, end: int) -> tuple[torch.Tensor, bool]:
        """The states after tokens `start` … `end`-1, and whether they were computed for this request."""
        import torch

        if self.store is None:  # each waits on its own account, so that the queue can refuse whom it has no room for
            made = await self._compute(request, start, end)
            return made.states_RD[start - made.start : end - made.start], True
        key, computed_for_it = (request.salt, sequence_key(request.sequence.ids[:end])), False
        while True:
            stored = await self._stored(request.sequence, start, end)
            first = start if stored is None else start + len(stored)
            if stored is not None and first == end:
                return stored, computed_for_it
            shared = key in self._under_way
            if not shared:
                self._begin(key, self._compute(request, first, end))
            try:
                made = await self._wait_for(key)
            except Overloaded:
                # It stood in the queue on the account of who began it; another student may have room on its own.
                if not shared:
                    raise
                continue
            computed_for_it |= not shared
            if made.start <= first:  # else it was begun by who wanted less of it
                rows = made.states_RD[first - made.start : end - made.start]
                return rows if stored is None else torch.cat([stored, rows.to(stored.dtype)]), computed_for_it

    async def _wait_for(self, key: tuple[str, str]) -> ComputedStates:
        computation = self._under_way[key]
        computation.waiting += 1
        try:
            # Shielded: the student that began it may go away, and the others still wait for it.
            return await asyncio.shield(computation.task)
        finally:
            computation.waiting -= 1
            if not computation.waiting and not computation.task.done():
                computation.task.cancel()
                self._under_way.pop(key, None)

    def _begin(self, key: tuple[str, str], computing: Coroutine[Any, Any, ComputedStates]) -> None:
        computation = _Computation(asyncio.create_task(computing))
        self._under_way[key] = computation

        def end(_: object) -> None:
            # Before those who wait for it go on, so that whoever tries again begins anew. After a cancellation the
            # key may be another's already.
            if self._under_way.get(key) is computation:
                del self._under_way[key]

        computation.task.add_done_callback(end)

    async def _compute(self, request: _Request, first: int, end: int) -> ComputedStates:
        """The states after tokens `first` … `end`-1 from the engine, at least; what is made is stored."""
        # What is before them and not cached is computed in pieces too.
        known = min(first, self._memory.known(request.sequence.ids[:end], request.salt))
        while True:
            reach = min(end, self._end_of_piece(request, known))
            made = await self._pass(request, known, min(first, reach), reach)
            if self.store is not None:
                await self._store(self.store, request.sequence, made)
            if reach == end:
                return made
            known = reach

    def _end_of_piece(self, request: _Request, start: int) -> int:
        """Where the piece that begins at `start` ends: with a batch, or before it has taken too long for others.

        Attention makes a token the dearer the more there are before it. One batch at the end of a long context then
        takes many times as long as a batch of short sequences, all of which wait for it.
        """
        batch, block = self._engine.batch_tokens, self._engine.block_tokens
        if not block or request.passes_that_did_not_pay >= _PASSES_THAT_DO_NOT_PAY:
            return len(request.sequence)
        share = self._fewest_seconds_a_token * _BATCHES_A_PIECE_MAY_TAKE / (request.seconds_a_token or 1e-9)
        if share < 1 and self.queue.others_came_within(_NEIGHBOUR_SECONDS, request.counters.student_id):
            batch = max(block, int(batch * max(share, _SHORTEST_PIECE)) // block * block)
        return (start // batch + 1) * batch

    async def _pass(self, request: _Request, known: int, first: int, end: int) -> ComputedStates:
        """One pass of the engine over the first `end` tokens, `known` of which it should find in its cache."""
        token_ids, counters = request.sequence.ids[:end].tolist(), request.counters
        self._memory.note(token_ids, request.salt)
        cost = end - known
        async with self.queue.admitted(
            counters.student_id, cost=cost, size=cost, begun=request.begun
        ) as waited_seconds:
            self.engine_passes, request.begun = self.engine_passes + 1, True
            counters.queue_seconds += waited_seconds
            started = time.monotonic()
            made = await self._engine.hidden_states(token_ids, first, request.salt)
            seconds = time.monotonic() - started
            counters.service_seconds += seconds
            self.queue.settle(counters.student_id, made.computed_tokens - cost)
        counters.computed_tokens += made.computed_tokens
        counters.cached_tokens += made.start
        counters.prefix_hits += made.start > 0
        request.seconds_a_token = seconds / made.computed_tokens
        if 2 * made.computed_tokens >= self._engine.batch_tokens:
            self._fewest_seconds_a_token = min(self._fewest_seconds_a_token, request.seconds_a_token)
        # The cache was evicted, or reaches beyond what is wanted: then each piece would compute all pieces before it.
        request.passes_that_did_not_pay += made.computed_tokens > 2 * self._engine.batch_tokens
        return made

    async def _stored(self, sequence: Prefixes, start: int, end: int) -> torch.Tensor | None:
        store = self.store
        return None if store is None else await self._in_thread(lambda: store.get(sequence, start, end))

    async def _store(self, store: SignalStore, sequence: Prefixes, made: ComputedStates) -> None:
        try:
            await self._in_thread(lambda: store.put(sequence, made.states_RD, made.start))
        except OSError as error:  # a full disk costs engine passes, not answers
            logger.warning("cannot store hidden states: %s", error)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)
