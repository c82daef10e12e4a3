"""Many students at once: nothing wrong, nobody pushed aside.

The forms that run always count and compare answers; nothing in them depends on how fast the machine is. How many
a second is asked by the long ones and by benchmarks/bench_teacher_load.py.
"""

from __future__ import annotations

import asyncio

import pytest

from fake_teacher import serving
from teacher_load import WINDOW, Students, fixed_latency_teacher, for_seconds, percentile, server_process, until

SECONDS = 3.0


async def test_sixteen_students_are_served_in_equal_shares():
    async with serving(fixed_latency_teacher(0.01)) as server:
        students = Students(server.address)
        names = [f"student-{number}" for number in range(16)]
        load = await until(
            students,
            lambda load: len(load.served) == 16 and load.served.total() >= 160,
            *map(students.closed_loop, names),
        )
    assert load.wrong == 0
    assert max(load.served.values()) <= 1.5 * min(load.served.values()) + WINDOW, load.served


async def test_overload_is_refused_long_before_others_are_answered_and_costs_nobody_anything():
    async with serving(fixed_latency_teacher(0.04, max_waiting=32)) as server:
        students = Students(server.address)
        load = await until(
            students,
            lambda load: len(load.refusal_seconds) >= 100 and load.served.total() >= 50,
            students.open_loop(8, 75),
            students.watch_health(),
        )
        async with asyncio.timeout(60):
            await students.recovered_after()
    assert load.wrong == 0
    assert all(50 <= milliseconds <= 5000 for milliseconds in load.retry_milliseconds)
    assert percentile(load.refusal_seconds, 50) <= 0.25 * percentile(load.answer_seconds, 50)
    assert load.health_seconds


@pytest.fixture
def address():
    with server_process(seconds=0.01) as (address, _):
        yield address


@pytest.mark.long
async def test_more_students_get_the_same_throughput_in_equal_shares(address):
    rates = {}
    for count in (1, 8, 32, 64):
        students = Students(address)
        load = await for_seconds(students, SECONDS, *(students.closed_loop(f"student-{i}") for i in range(count)))
        assert load.wrong == 0
        assert len(load.served) == count
        # A slow client reads a window of answers late that were sent before; a short run must not count that.
        assert max(load.served.values()) - WINDOW <= 1.5 * min(load.served.values())
        rates[count] = load.a_second
    assert rates[64] >= 0.9 * rates[8], rates


@pytest.mark.long
async def test_a_greedy_student_leaves_the_others_their_share(address):
    students = Students(address)
    polite = [f"polite-{i}" for i in range(7)]
    load = await for_seconds(students, SECONDS, students.closed_loop("greedy", 16), *map(students.closed_loop, polite))
    assert load.wrong == 0
    assert min(load.served[student] for student in polite) >= 0.8 * load.served.total() / 8, load.served


@pytest.mark.long
async def test_three_times_what_it_can_do_is_refused_fast_and_costs_nobody():
    capacity_a_second = 25
    with server_process(seconds=1 / capacity_a_second, max_waiting=32) as (address, process):
        students = Students(address)
        load = await for_seconds(
            students, SECONDS, students.open_loop(8, 3 * capacity_a_second), students.watch_health(), warm_up=2.0
        )
        resident_bytes = process.memory_info().rss
        recovered_seconds = await students.recovered_after()
        assert process.memory_info().rss - resident_bytes < 50 * 2**20
    assert load.wrong == 0
    assert load.a_second >= 0.9 * capacity_a_second
    assert len(load.refusal_seconds) >= 1.5 * load.served.total()
    assert all(50 <= milliseconds <= 5000 for milliseconds in load.retry_milliseconds)
    assert percentile(load.refusal_seconds, 99) <= 0.05
    assert percentile(load.health_seconds, 99) <= 0.5
    assert recovered_seconds <= 2.0
