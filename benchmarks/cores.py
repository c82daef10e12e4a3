"""What is a second core of this machine worth? The same work on one core, and on both at once.

    python benchmarks/cores.py [--seconds 2]

Cores share memory, and often their matrix units and clock. What is printed bounds what a second engine or server on a
machine can bring: for products whose factors stay in a core's cache, for products that read their weights from memory
as a model's layers do, for float32 products without matrix units, for copying, and for Python.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

ROWS, WIDTH, LAYERS = 128, (576, 1536), 120
COPIED_BYTES = 64 * 2**20


def work_of(kind: str) -> Callable[[], object]:
    """One piece of work, on one thread."""
    import torch

    torch.set_num_threads(1)
    if kind == "python":
        return lambda: sum(number * number for number in range(20_000))
    if kind == "copying":
        numbers = torch.randn(COPIED_BYTES // 4)
        return lambda: numbers.add_(1)
    if kind == "float32 products":
        square = torch.randn(256, 256)
        return lambda: square @ square
    rows = torch.randn(ROWS, WIDTH[0]).bfloat16()
    weights = [torch.randn(*WIDTH).bfloat16() for _ in range(1 if kind == "bfloat16 products" else LAYERS)]
    return lambda: [rows @ weight for weight in weights]


def count(kind: str, core: int, start: Any, seconds: float, counts: Any) -> None:
    """How often a second the work is done on a core; a process of its own."""
    os.sched_setaffinity(0, {core})
    work = work_of(kind)
    work()
    start.wait()
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        work()
        done += 1
    counts.put(done / spent)


def rate(kind: str, cores: list[int], seconds: float) -> float:
    """Of all these cores together."""
    spawned = multiprocessing.get_context("spawn")
    start, counts = spawned.Barrier(len(cores)), spawned.Queue()
    processes = [spawned.Process(target=count, args=(kind, core, start, seconds, counts)) for core in cores]
    for process in processes:
        process.start()
    total = sum(counts.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each (%(default)s)")
    seconds = parser.parse_args().seconds
    first, second = sorted(os.sched_getaffinity(0))[:2]
    for kind in ("bfloat16 products", "bfloat16 layers", "float32 products", "copying", "python"):
        one, other, both = (rate(kind, cores, seconds) for cores in ([first], [second], [first, second]))
        print(f"{kind:<20} both cores / one {2 * both / (one + other):.2f}", flush=True)


if __name__ == "__main__":
    main()
