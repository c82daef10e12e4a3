"""The fair queue: order, weights, bound, and that no cancellation loses a place."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import random
from collections import Counter

import pytest

from tutelage.errors import Overloaded
from tutelage.rpc.transport import error_of_refusal, refusal_of_error
from tutelage.teacher_server.admission.fair_queue import FairQueue


async def one_at_a_time(queue: FairQueue, jobs: list[tuple[str, float]]) -> list[str]:
    """The order in which jobs that all wait are admitted."""
    order = []

    async def job(student: str, cost: float) -> None:
        async with queue.admitted(student, cost=cost, size=1):
            order.append(student)
            await asyncio.sleep(0)

    await asyncio.gather(*(job(*each) for each in jobs))
    return order


async def test_students_take_turns_however_much_they_ask_for():
    jobs = [("greedy", 1.0)] * 50 + [("polite", 1.0)] * 5
    order = await one_at_a_time(FairQueue(capacity=1), jobs)
    assert Counter(order[1:11]) == {"greedy": 5, "polite": 5}


async def test_shares_are_of_cost_and_by_weight():
    queue = FairQueue(capacity=1, weights={"heavy": 3.0})
    order = await one_at_a_time(queue, [("light", 2.0)] * 40 + [("heavy", 1.0)] * 120)
    counts = Counter(order[:70])
    assert counts["heavy"] / counts["light"] == pytest.approx(6.0, rel=0.15)


async def test_who_was_idle_gets_no_credit_for_it():
    queue = FairQueue(capacity=1)
    blocker = asyncio.create_task(one_at_a_time(queue, [("early", 1.0)] * 100))
    await asyncio.sleep(0)
    while queue.waiting > 50:
        await asyncio.sleep(0)
    order = await one_at_a_time(queue, [("late", 1.0)] * 10)
    assert order == ["late"] * 10
    assert not blocker.done()
    await blocker


async def test_who_came_lately_is_known():
    queue = FairQueue(capacity=1)
    assert not queue.others_came_within(60, "ann")
    await one_at_a_time(queue, [("ann", 1.0)] * 2)
    assert not queue.others_came_within(60, "ann")
    assert queue.others_came_within(60, "ben")
    await one_at_a_time(queue, [("ben", 1.0), ("ann", 1.0), ("ann", 1.0)])
    assert queue.others_came_within(60, "ann")
    assert not queue.others_came_within(0, "ann")


async def test_no_more_than_the_capacity_is_admitted_and_a_larger_job_alone():
    queue, seen = FairQueue(capacity=10), []

    async def job(size: int) -> None:
        async with queue.admitted("s", cost=size, size=size):
            seen.append(queue.admitted_size)
            await asyncio.sleep(0.001)

    await asyncio.gather(*map(job, [4, 4, 4, 25, 1, 9, 3]))
    assert max(size for size in seen if size != 25) <= 10
    assert 25 in seen
    assert (queue.admitted_size, queue.waiting) == (0, 0)


async def test_when_it_is_full_whoever_fills_it_is_refused_and_others_are_not():
    queue = FairQueue(capacity=1, max_waiting=6)
    release = asyncio.Event()

    async def job(student: str) -> str:
        async with queue.admitted(student, cost=1, size=1):
            await release.wait()
        return student

    tasks = [asyncio.create_task(job(student)) for student in ["greedy"] * 8 + ["polite"] * 4 + ["greedy"]]
    await asyncio.sleep(0.01)
    refused = [task for task in tasks if task.done()]
    # One is admitted, six wait; then half of the places are the polite one's.
    assert refused == [tasks[7], tasks[11], tasks[12]]
    with pytest.raises(Overloaded) as refusal:
        refused[0].result()
    assert 50 <= refusal.value.retry_after_milliseconds <= 5000
    assert all(task.exception() is not None for task in refused)
    release.set()
    assert await asyncio.gather(*(task for task in tasks if task not in refused)) == ["greedy"] * 7 + ["polite"] * 3


async def test_however_many_students_come_it_stays_bounded():
    queue, release = FairQueue(capacity=1, max_waiting=6), asyncio.Event()

    async def job(student: str) -> None:
        with contextlib.suppress(Overloaded):
            async with queue.admitted(student, cost=1, size=1):
                await release.wait()

    tasks = [asyncio.create_task(job(f"student-{number % 20}")) for number in [0] * 10 + list(range(100))]
    await asyncio.sleep(0.01)
    assert 6 < queue.waiting <= 6 + 20
    release.set()
    await asyncio.gather(*tasks)
    assert queue.waiting == 0


async def test_students_that_ask_alike_are_refused_when_they_ask_and_not_later():
    """Three times what is done, round robin: who has waited is not given up for somebody with one job fewer."""
    queue, done, arrived = FairQueue(capacity=1, max_waiting=16), asyncio.Queue(), 0
    arrivals_until_refused, served = [], Counter()

    async def job(student: str) -> None:
        own = arrived
        try:
            async with queue.admitted(student, cost=1, size=1):
                await done.get()
                served[student] += 1
        except Overloaded:
            arrivals_until_refused.append(arrived - own)

    tasks = []
    for arrived in range(600):
        tasks.append(asyncio.create_task(job(f"student-{arrived % 8}")))
        if arrived % 3 == 0:
            done.put_nowait(None)
        await asyncio.sleep(0.001)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(arrivals_until_refused) > 300
    assert max(arrivals_until_refused) == 0
    assert max(served.values()) <= min(served.values()) + 2


async def test_cancelling_at_any_moment_loses_no_place():
    queue, rng = FairQueue(capacity=5, max_waiting=30), random.Random(0)

    async def job(number: int) -> None:
        async with queue.admitted(f"student-{number % 5}", cost=1 + number % 7, size=1 + number % 7):
            await asyncio.sleep(rng.choice([0, 0.0005]))

    for _ in range(40):
        tasks = [asyncio.create_task(job(number)) for number in range(40)]
        for task in rng.sample(tasks, 25):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (queue.admitted_size, queue.waiting, queue._students) == (0, 0, {})


def test_the_retry_delay_travels():
    error = Overloaded("full", "", 250)
    assert pickle.loads(pickle.dumps(error)).retry_after_milliseconds == 250
    assert error_of_refusal(refusal_of_error(error)).retry_after_milliseconds == 250


async def test_it_tells_how_long_a_job_waited_and_how_long_it_was_busy():
    queue = FairQueue(capacity=1)

    async def job() -> float:
        async with queue.admitted("ann", cost=1, size=1) as waited_seconds:
            await asyncio.sleep(0.05)
        return waited_seconds

    first, second = await asyncio.gather(job(), job())
    assert first < 0.04 < second
    busy = queue.busy_seconds
    assert busy >= 0.09
    await asyncio.sleep(0.03)
    assert queue.busy_seconds == busy
