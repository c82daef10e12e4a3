"""Many students at once, in a short form of benchmarks/bench_teacher_load.py: nothing wrong, nobody pushed aside."""

from __future__ import annotations

import pytest
from teacher_load import WINDOW, Students, for_seconds, percentile, server_process

SECONDS = 3.0


# Rates depend on what else the machine does, so a normal run does not wait for them.
pytestmark = pytest.mark.long


@pytest.fixture
def address():
    with server_process(seconds=0.01) as (address, _):
        yield address


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


async def test_a_greedy_student_leaves_the_others_their_share(address):
    students = Students(address)
    polite = [f"polite-{i}" for i in range(7)]
    load = await for_seconds(students, SECONDS, students.closed_loop("greedy", 16), *map(students.closed_loop, polite))
    assert load.wrong == 0
    assert min(load.served[student] for student in polite) >= 0.8 * load.served.total() / 8, load.served


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
    assert percentile(load.refusal_seconds, 50) <= 0.05
    assert percentile(load.health_seconds, 99) <= 0.5
    assert recovered_seconds <= 2.0
