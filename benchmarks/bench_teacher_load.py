"""Many students of one teacher whose engine takes a fixed time: throughput, fairness, overload.

    python benchmarks/bench_teacher_load.py [--seconds 60]

The engine is the tests' double (one sequence of 512 tokens at a time, k = 64); gRPC, admission, the signal
head and the frames are the real ones, in a process of their own. Every answer is compared byte for byte.
Exits with 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import psutil  # noqa: E402

from teacher_load import Students, for_seconds, percentile, server_process  # noqa: E402

ENGINE_SECONDS = 0.01
CAPACITY_UNDER_OVERLOAD = 25
broken: list[str] = []


def report(what: str, value: float, unit: str, kept: bool, promise: str) -> None:
    """Prints one measurement beside what is promised, and remembers a broken promise."""
    print(f"{what:<52}{value:10.3f} {unit:<6} {'ok ' if kept else 'NO '} {promise}")
    if not kept:
        broken.append(what)


async def many(seconds: float) -> None:
    """1, 8, 32 and 64 students that always have eight requests in flight."""
    rates = {}
    with server_process(ENGINE_SECONDS) as (address, _):
        for count in (1, 8, 32, 64):
            students = Students(address)
            load = await for_seconds(students, seconds, *(students.closed_loop(f"s-{i}") for i in range(count)))
            rates[count] = load.a_second
            ratio = max(load.served.values()) / min(load.served.values())
            report(f"{count} students: sequences a second", load.a_second, "1/s", load.wrong == 0, "no wrong answer")
            report(f"{count} students: most / least served", ratio, "", ratio <= 1.5, "<= 1.5")
    ratio = rates[64] / rates[8]
    report("throughput at 64 students / at 8", ratio, "", ratio >= 0.9, ">= 0.9")


async def greedy(seconds: float) -> None:
    """One student with 64 streams against seven with one."""
    with server_process(ENGINE_SECONDS) as (address, _):
        students, polite = Students(address), [f"polite-{i}" for i in range(7)]
        load = await for_seconds(
            students, seconds, students.closed_loop("greedy", 64), *map(students.closed_loop, polite)
        )
    share = min(load.served[student] for student in polite) / (load.served.total() / 8)
    report("least served polite student / its share", share, "", share >= 0.8, ">= 0.8")


async def overload(seconds: float) -> None:
    """Three times what the engine can do, whatever becomes of the requests."""
    with server_process(1 / CAPACITY_UNDER_OVERLOAD, max_waiting=32) as (address, process):
        students = Students(address)
        offered = students.open_loop(8, 3 * CAPACITY_UNDER_OVERLOAD)
        before = asyncio.create_task(_resident_bytes_in(process, seconds=2.0))
        load = await for_seconds(students, seconds, offered, students.watch_health(), warm_up=2.5)
        growth = (process.memory_info().rss - await before) / 2**20
        recovered = await students.recovered_after()
    goodput = load.a_second / CAPACITY_UNDER_OVERLOAD
    report("goodput / capacity", goodput, "", goodput >= 0.9 and not load.wrong, ">= 0.9, no wrong answer")
    refused = 1000 * percentile(load.refusal_seconds, 99)
    report(f"{len(load.refusal_seconds)} refusals, p99", refused, "ms", refused <= 50, "<= 50 ms")
    health = 1000 * percentile(load.health_seconds, 99)
    report(f"{len(load.health_seconds)} health checks, all serving, p99", health, "ms", health <= 200, "<= 200 ms")
    report("growth of resident memory", growth, "MiB", growth <= 50, "<= 50 MiB")
    report("first answer after the load", recovered, "s", recovered <= 2, "<= 2 s")


async def _resident_bytes_in(process: psutil.Process, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return int(process.memory_info().rss)


async def main() -> int:
    """Runs the three scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each scenario (%(default)s)")
    seconds = parser.parse_args().seconds
    await many(seconds / 4)
    await greedy(seconds)
    await overload(seconds)
    return bool(broken)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
