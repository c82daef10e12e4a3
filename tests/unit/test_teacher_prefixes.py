"""What is computed of a sequence whose beginning was computed before, and on whose account."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import data, integers, lists, sampled_from

from fake_teacher import VOCABULARY_SIZE, FakeScoringEngine, fake_teacher
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.fair_queue import FairQueue
from tutelage.teacher_server.engine.prefix_memory import PrefixMemory
from tutelage.teacher_server.signals.hidden_states import HiddenStates
from tutelage.teacher_server.signals.store import SignalStore

RNG = random.Random(0)


def tokens(count: int) -> list[int]:
    return RNG.choices(range(VOCABULARY_SIZE), k=count)


class Cached(FakeScoringEngine):
    """An engine with a prefix cache that notes how many tokens each pass computed."""

    def __init__(self, block_tokens: int = 32, batch_tokens: int = 512) -> None:
        super().__init__(block_tokens=block_tokens, batch_tokens=batch_tokens)
        self.computed = []

    async def hidden_states(self, token_ids, first=0, salt=""):
        made = await super().hidden_states(token_ids, first, salt)
        self.computed.append(made.computed_tokens)
        return made


def source(engine: FakeScoringEngine, store: SignalStore | None = None) -> HiddenStates:
    return HiddenStates(engine, FairQueue(capacity=2 * engine.batch_tokens), store)


async def ask(states: HiddenStates, ids, start=0, end=None, student="ann", salt=""):
    """The states after tokens `start` … `end`-1, and what the student's counters say of them."""
    counters = pb.StudentUsage(student_id=student)
    pieces = [piece async for piece in states.of(ids, start, end or len(ids), counters, salt)]
    return torch.cat(pieces), counters


def right(engine: FakeScoringEngine, ids, start=0, end=None) -> torch.Tensor:
    return engine.embeddings[list(ids)].cumsum(0).bfloat16()[start:end]


async def test_completions_of_one_prompt_cost_what_comes_after_it():
    engine, prompt = Cached(), tokens(600)
    states = source(engine)
    completions = [[*prompt, *tokens(40)] for _ in range(8)]
    answers = await asyncio.gather(*(ask(states, ids, 599, 639) for ids in completions))
    for ids, (rows, _) in zip(completions, answers, strict=True):
        assert torch.equal(rows, right(engine, ids, 599, 639))
    assert sum(engine.computed) == 639 + 7 * (639 - 576)
    assert sum(counters.computed_tokens for _, counters in answers) == sum(engine.computed)


async def test_a_sequence_that_grows_costs_its_growth():
    """In pieces of a block, each scored from where the last one ended, its last token without a row."""
    engine, ids = Cached(), tokens(512)
    states, scored = source(engine), 0
    for length in range(32, 513, 32):
        rows, _ = await ask(states, ids[:length], scored, length - 1)
        assert torch.equal(rows, right(engine, ids, scored, length - 1))
        scored = length - 1
    assert max(engine.computed) < 2 * 32


async def test_a_chat_costs_its_turns():
    engine, ids = Cached(), tokens(480)
    states = source(engine)
    for turn in range(6):
        start, end = 80 * turn + 30, 80 * (turn + 1)
        rows, _ = await ask(states, ids[:end], start, end - 1)
        assert torch.equal(rows, right(engine, ids, start, end - 1))
    assert sum(engine.computed) <= 1.3 * len(ids)


async def test_rows_that_the_cache_hides_are_computed_again():
    """The cache reaches beyond the first scored position: nobody gets a row that was not computed."""
    engine, ids = Cached(), tokens(300)
    states = source(engine)
    for start in (0, 10, 200, 299):
        rows, counters = await ask(states, ids, start)
        assert torch.equal(rows, right(engine, ids, start))
        assert (counters.prefix_hits, counters.cached_tokens) == ((1, 288) if start == 299 else (0, 0))


async def test_with_a_store_the_hidden_rows_come_from_there(tmp_path):
    engine, ids = Cached(), tokens(300)
    states = source(engine, SignalStore(tmp_path, "teacher", 10**7))
    await ask(states, ids)
    grown = [*ids, *tokens(40)]
    rows, _ = await ask(states, grown)
    assert torch.equal(rows, right(engine, grown))
    assert engine.computed == [300, 340 - 288]
    states.close()


async def test_a_long_sequence_goes_through_in_batches_between_which_others_go_first():
    engine, ids = Cached(batch_tokens=64), tokens(1000)
    engine.seconds = 0.01
    states = source(engine)
    long = asyncio.create_task(ask(states, ids, 0, 1000, "long"))
    await asyncio.sleep(0.02)
    await asyncio.gather(*(ask(states, tokens(40), 0, 40, "short") for _ in range(3)))
    assert not long.done()
    rows, counters = await long
    assert torch.equal(rows, right(engine, ids))
    assert counters.computed_tokens == 1000
    assert max(engine.computed) == 64


@pytest.mark.parametrize("neighbours", [True, False])
async def test_the_pieces_of_a_long_sequence_get_short_where_they_take_long_and_somebody_waits(neighbours):
    class Slower(Cached):
        """Takes longer for a token the more there are before it."""

        async def hidden_states(self, token_ids, first=0, salt=""):
            await asyncio.sleep(2e-7 * (len(token_ids) - first) * len(token_ids))
            return await super().hidden_states(token_ids, first, salt)

    engine, ids = Slower(batch_tokens=128), tokens(20 * 128)
    states = source(engine)
    long = asyncio.create_task(ask(states, ids, student="long"))
    while not long.done():
        await asyncio.sleep(0.01)
        if neighbours:
            await ask(states, tokens(20), student="short")
    rows, _ = await long
    assert torch.equal(rows, right(engine, ids))
    pieces = [computed for computed in engine.computed if computed != 20]
    assert pieces[:3] == [128] * 3
    assert (min(pieces[-10:]) == 32) is neighbours


@pytest.mark.parametrize(("config", "batches"), [({}, 2), ({"data_parallel_size": 4}, 8), ({"score_engines": 2}, 4)])
async def test_what_an_engine_does_not_compute_waits_in_the_queue(config, batches):
    """All but a batch and the next one, however long a sequence may be: in the queue, who is next is open."""
    engine = Cached()
    engine.seconds = 60
    states = fake_teacher(engine, config=config, max_sequence_tokens=100_000).scoring.states
    asking = [asyncio.create_task(ask(states, tokens(512))) for _ in range(20)]
    await asyncio.sleep(0.05)
    assert engine.started == batches
    for each in asking:
        each.cancel()
    await asyncio.wait(asking)


async def test_a_long_prompt_that_nobody_scores_goes_through_in_batches_too():
    engine, ids = Cached(batch_tokens=64), tokens(1000)
    rows, _ = await ask(source(engine), ids, 990)
    assert torch.equal(rows, right(engine, ids, 990))
    assert max(engine.computed) <= 64
    assert sum(engine.computed) == 1000


async def test_a_cache_that_is_ahead_does_not_make_each_piece_cost_all_before_it():
    """The same long sequence for a second student, without a store."""
    engine, ids = Cached(batch_tokens=64), tokens(2000)
    states = source(engine)
    await ask(states, ids)
    before = sum(engine.computed)
    rows, _ = await ask(states, ids, student="ben")
    assert torch.equal(rows, right(engine, ids))
    assert sum(engine.computed) - before < 2 * len(ids)


async def test_an_engine_without_a_cache_computes_a_sequence_at_once():
    engine, ids = FakeScoringEngine(batch_tokens=64), tokens(1000)
    rows, _ = await ask(source(engine), ids, 500)
    assert torch.equal(rows, right(engine, ids, 500))
    assert engine.started == 1


async def test_what_is_kept_apart_is_not_reused():
    engine, ids = Cached(), tokens(300)
    states = source(engine)
    await ask(states, ids, 299)
    _, same = await ask(states, ids, 299)
    _, other = await ask(states, ids, 299, salt="other")
    assert (same.cached_tokens, other.cached_tokens) == (288, 0)


@settings(max_examples=100, deadline=None)
@given(data())
def test_whatever_was_asked_before_the_rows_are_right(tmp_path_factory, data):
    store = data.draw(sampled_from([None, 20_000, 10**6]))
    folder = tmp_path_factory.mktemp("store") if store else None
    engine = Cached(block_tokens=data.draw(sampled_from([4, 32])), batch_tokens=data.draw(sampled_from([32, 64])))
    states = source(engine, SignalStore(folder, "teacher", store) if store else None)

    async def all_of_it():
        for _ in range(6):
            ids = data.draw(lists(integers(0, 1), min_size=1, max_size=4)) * data.draw(integers(1, 50))
            start = data.draw(integers(0, len(ids) - 1))
            end = data.draw(integers(start + 1, len(ids)))
            rows, _ = await ask(states, ids, start, end)
            assert torch.equal(rows, right(engine, ids, start, end))

    asyncio.run(all_of_it())
    states.close()


def test_a_memory_forgets_ends_before_beginnings_and_what_is_old_first():
    memory, one, other = PrefixMemory(4, 16), tokens(16), tokens(13)
    memory.note(one)
    assert [memory.known(one), memory.known(one[:9]), memory.known(one, "salt")] == [12, 8, 0]
    memory.note(other)
    assert (memory.known(other), memory.known(one)) == (12, 4)
    assert PrefixMemory(0, 1000).known(one) == 0


async def test_who_computes_a_prompt_pays_for_it_and_who_reuses_it_does_not():
    """By what was computed, and not by what was sent, it is decided whose turn it is."""
    queue = FairQueue(capacity=1)
    order = []

    async def job(student: str, cost: float, spent: float) -> None:
        async with queue.admitted(student, cost=cost, size=1):
            order.append(student)
            await asyncio.sleep(0)
            queue.settle(student, spent - cost)

    await asyncio.gather(*(job("dear", 100, 10) for _ in range(4)), *(job("cheap", 10, 10) for _ in range(4)))
    assert order == ["dear", "cheap"] * 4


@pytest.mark.parametrize("difference", [5.0, -5.0])
async def test_a_correction_for_a_student_that_is_gone_harms_nobody(difference):
    queue = FairQueue(capacity=1)
    queue.settle("gone", difference)
    async with queue.admitted("ann", cost=1, size=1) as waited_seconds:
        assert waited_seconds < 1
