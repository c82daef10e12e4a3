"""A computation that students share: whose refusal, failure and end is whose."""

from __future__ import annotations

import asyncio

import pytest
import torch

from tutelage.errors import Overloaded, Unreachable
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.fair_queue import FairQueue
from tutelage.teacher_server.engine.base import ComputedStates
from tutelage.teacher_server.signals.hidden_states import HiddenStates
from tutelage.teacher_server.signals.store import SignalStore


class Engine:
    """Answers once it may."""

    dead, block_tokens, cache_tokens, batch_tokens = False, 0, 0, 512

    def __init__(self) -> None:
        self.may_answer, self.given, self.fails = asyncio.Event(), [], None

    async def hidden_states(self, token_ids, first, salt):
        self.given.append(list(token_ids))
        await self.may_answer.wait()
        if self.fails:
            raise self.fails
        return ComputedStates(torch.tensor(token_ids)[:, None].expand(-1, 8).bfloat16(), 0, len(token_ids))


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def states(engine, tmp_path):
    queue = FairQueue(capacity=1, max_waiting=2)
    made = HiddenStates(engine, queue, SignalStore(tmp_path, "teacher", 10**6))
    yield made
    made.close()


def asks(states: HiddenStates, student: str, token_ids: list[int]) -> asyncio.Task:
    return asyncio.create_task(rows_of(states, token_ids, 0, pb.StudentUsage(student_id=student)))


async def rows_of(states, token_ids, start, counters, salt="", end=None):
    """The states after tokens `start` …, put together."""
    pieces = states.of(token_ids, start, len(token_ids) if end is None else end, counters, salt)
    return torch.cat([piece async for piece in pieces])


async def fill(states: HiddenStates, student: str) -> list[asyncio.Task]:
    """One sequence in the engine and as many waiting as may."""
    tasks = [asks(states, student, [number]) for number in (1, 2, 3)]
    while states.waiting < 2:
        await asyncio.sleep(0)
    return tasks


async def test_a_refusal_stays_with_the_student_that_has_its_share(states, engine):
    filling = await fill(states, "greedy")
    wanted = [asks(states, student, [7, 8]) for student in ("greedy", "ann", "ben")]
    with pytest.raises(Overloaded):
        await wanted[0]
    engine.may_answer.set()
    ann, ben = await asyncio.gather(*wanted[1:])
    assert torch.equal(ann, ben)
    assert engine.given.count([7, 8]) == 1
    await asyncio.gather(*filling)


async def test_a_dead_engine_reaches_all_who_share_a_computation(states, engine):
    engine.fails = Unreachable("dead")
    asking = [asks(states, student, [7, 8]) for student in ("ann", "ben")]
    await asyncio.sleep(0.1)  # until both have found nothing in the store
    engine.may_answer.set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(outcome, Unreachable) for outcome in outcomes)
    assert engine.given == [[7, 8]]


async def test_who_asks_after_a_failure_is_computed_anew(states, engine):
    engine.fails = Unreachable("dead")
    engine.may_answer.set()
    with pytest.raises(Unreachable):
        await asks(states, "ann", [7, 8])
    engine.fails = None
    assert len(await asks(states, "ben", [7, 8])) == 2


async def test_a_computation_that_nobody_waits_for_is_given_up_and_begun_anew(states, engine):
    first = asks(states, "ann", [7, 8])
    while not engine.given:
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    engine.may_answer.set()
    assert len(await asks(states, "ben", [7, 8])) == 2
    assert engine.given == [[7, 8]] * 2
