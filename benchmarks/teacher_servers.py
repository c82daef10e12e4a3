"""What does a second server of one teacher bring? Two on a core each against one of them on its core.

    python benchmarks/teacher_servers.py [--rounds 5] [--sequences 16] [--tokens 256] [--model DIR] [--plain]

Each server (engine, front end, signal head) may use one core only. A round scores the same new random sequences,
`topk` of k = 64, with the first server, with the second, and with both, in an order that changes. The trainer's client
has to run somewhere: beside one server it has the other core to itself, beside two it shares both. The ratio is that of
both to the mean of the two alone; its median over the rounds must be what is promised, or the command exits with 1.

`--plain` measures the machine instead: the same with two of vLLM's own engines that prefill, each on a core, with half
of the sequences for either. Two cores that share memory and matrix units are less than two machines.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from packaged_models import PACKAGED, model_folder  # noqa: E402
from teacher_engine import engine_side, start_engine  # noqa: E402
from teacher_speed import Side, our_side  # noqa: E402

from teacher_process import TeacherProcess, running  # noqa: E402
from tutelage.identity import tokenizer_digests, vocabulary_size  # noqa: E402
from tutelage.teacher_server.config import TeacherConfig  # noqa: E402
from tutelage.teacher_server.engine.vllm import prepare_environment  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402

PROMISED = 1.7
SPIN_SECONDS = 1.5
"""Before each turn: vLLM's processes go on spinning for a second after their last work, on cores of the next."""


def server_on(core: int, folder: Path, model: Path, stack: ExitStack) -> TeacherProcess:
    """A server that may use one core, which its processes inherit from who starts it."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return stack.enter_context(running(folder / str(core), model, "--max-model-len", "512"))
    finally:
        os.sched_setaffinity(0, cores)


def seconds(side: Side, sequences: list[list[int]]) -> float:
    """How long one side takes for them."""
    time.sleep(SPIN_SECONDS)
    started = time.perf_counter()
    side(sequences)
    return time.perf_counter() - started


@contextmanager
def servers(model: Path, cores: list[int]) -> Iterator[dict[str, Side]]:
    """Two servers, alone and as one teacher."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        first, second = (server_on(core, Path(folder), model, stack).address for core in cores)
        sides: dict[str, Side] = {}
        for name, address in {"first": first, "second": second, "both": [first, second]}.items():
            digests = tokenizer_digests(model)
            client = TeacherClient(address, student_id=name, wait_seconds=120, tokenizer_digests=digests)
            sides[name] = our_side(stack.enter_context(client))
        yield sides


@contextmanager
def plain_engines(model: Path, cores: list[int]) -> Iterator[dict[str, Side]]:
    """Two engines that prefill, alone and with half of the sequences each."""
    config = TeacherConfig(model=str(model), max_model_len=512)
    prepare_environment(config)
    may_use, engines = os.sched_getaffinity(0), []
    for core in cores:
        os.sched_setaffinity(0, {core})  # the engine's process inherits it
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
        engines.append(start_engine("generate", 2048, config))
    os.sched_setaffinity(0, may_use)
    first, second = (engine_side("generate", engine) for engine in engines)

    def both(sequences: list[list[int]]) -> None:
        half = len(sequences) // 2
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda side, share: side(share), (first, second), (sequences[:half], sequences[half:])))

    yield {"first": first, "second": second, "both": both}
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()


def main() -> int:
    """Starts both servers, then lets the sides take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, default=PACKAGED)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--plain", action="store_true", help="vLLM's own engines instead of servers")
    options = parser.parse_args()
    generator, vocabulary = np.random.default_rng(0), vocabulary_size(options.model)
    rates: dict[str, list[float]] = {"first": [], "second": [], "both": []}
    started = plain_engines if options.plain else servers
    with started(options.model, sorted(os.sched_getaffinity(0))[:2]) as sides:
        for round_number in range(-1, options.rounds):  # the first warms up
            shape = (options.sequences, options.tokens)
            sequences = generator.integers(3, vocabulary, shape).tolist()
            names = list(rates)
            for name in names[round_number % 3 :] + names[: round_number % 3]:
                used = seconds(sides[name], sequences)
                if round_number >= 0:
                    rates[name].append(options.sequences * options.tokens / used)
            if round_number >= 0:
                print(", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()), flush=True)
    for name, values in rates.items():
        print(f"{name:<7} {statistics.median(values):7.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
    ratios = [2 * both / (one + other) for one, other, both in zip(*rates.values(), strict=True)]
    ratio = statistics.median(ratios)
    verdict = "ok" if ratio >= PROMISED else "NO"
    print(f"both / one {ratio:5.2f} ({min(ratios):.2f} to {max(ratios):.2f})  {verdict}, promised {PROMISED}")
    return ratio < PROMISED


if __name__ == "__main__":
    sys.exit(main())
