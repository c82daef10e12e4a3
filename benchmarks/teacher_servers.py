"""What does a second server of one teacher bring? Two on a core each against one of them on its core.

    python benchmarks/teacher_servers.py [--rounds 5] [--sequences 16] [--tokens 256] [--model DIR]

Each server (engine, front end, signal head) may use one core only. A round scores the same new random sequences,
`topk` of k = 64, with the first server, with the second, and with both, in an order that changes. The trainer's client
has to run somewhere: beside one server it has the other core to itself, beside two it shares both. The ratio is that of
both to the mean of the two alone; its median over the rounds must be what is promised, or the command exits with 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import numpy as np  # noqa: E402

from teacher_process import TeacherProcess, running  # noqa: E402
from tutelage.identity import tokenizer_digests, vocabulary_size  # noqa: E402
from tutelage.trainer.data.sequences import TokenSequence  # noqa: E402
from tutelage.trainer.teacher.base import SignalSpec  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402

SPEC = SignalSpec("topk", k=64, temperatures=(1.0,))
BUILD = Path(os.environ.get("TUTELAGE_BUILD_DIR", ROOT / "build"))
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


def seconds(client: TeacherClient, sequences: list[TokenSequence]) -> float:
    """How long it takes to have them scored."""
    time.sleep(SPIN_SECONDS)
    started = time.perf_counter()
    client.score(sequences, SPEC)
    return time.perf_counter() - started


def main() -> int:
    """Starts both servers, then lets the sides take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILD / "models" / "teacher")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    tokens, vocabulary = options.sequences * options.tokens, vocabulary_size(options.model)
    rates: dict[str, list[float]] = {"first": [], "second": [], "both": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cores = sorted(os.sched_getaffinity(0))[:2]
        first, second = (server_on(core, Path(folder), options.model, stack).address for core in cores)
        clients = {
            name: stack.enter_context(
                TeacherClient(
                    address, student_id=name, wait_seconds=120, tokenizer_digests=tokenizer_digests(options.model)
                )
            )
            for name, address in {"first": first, "second": second, "both": [first, second]}.items()
        }
        for round_number in range(-1, options.rounds):  # the first warms up
            ids = generator.integers(0, vocabulary, (options.sequences, options.tokens), dtype=np.int32)
            sequences = [TokenSequence(each, 0, options.tokens) for each in ids]
            names = list(rates)
            for name in names[round_number % 3 :] + names[: round_number % 3]:
                used = seconds(clients[name], sequences)
                if round_number >= 0:
                    rates[name].append(tokens / used)
    for name, values in rates.items():
        print(f"{name:<7} {statistics.median(values):7.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
    ratios = [2 * both / (one + other) for one, other, both in zip(*rates.values(), strict=True)]
    ratio = statistics.median(ratios)
    verdict = "ok" if ratio >= PROMISED else "NO"
    print(f"both / one {ratio:5.2f} ({min(ratios):.2f} to {max(ratios):.2f})  {verdict}, promised {PROMISED}")
    return ratio < PROMISED


if __name__ == "__main__":
    sys.exit(main())
