"""Is the teacher faster than the vLLM engine that it is built on? Same model, sequences, cores and run, in turn.

    python benchmarks/teacher_speed.py [--rounds 25] [--sequences 16] [--tokens 256] [--model DIR]
        [--score-engines 2] [--head-threads 1] [--vllm-cores 0] [--against="--data-parallel-size 2"]

    ours     `topk` of k = 64 through `tutelage teacher serve`, asked for, decoded and checked by the trainer's client
    flat     the same engine's in-process `generate(prompt_logprobs=64, flat_logprobs=True)`
    prefill  the same engine's in-process `generate`, without log-probabilities
    against  with `--against`, a second server with these options, asked as ours is

Each round has new random sequences, the same for all sides, so that neither a prefix cache nor a store can help; the
order of the sides changes from round to round. The in-process engine computes on all cores but one, which is what vLLM
itself leaves to its front end, unless `--vllm-cores` names others; the server has the same cores and that one.
Speeds are medians over the rounds; a ratio is the median of the rounds' ratios, with the range that holds 95 % of such
medians over rounds drawn anew (bootstrap): where a machine's speed changes from second to second, few rounds say
little. The processor seconds that each process spent in the meantime say where the time goes. Exits with 1 if a promise
is broken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from packaged_models import PACKAGED, model_folder  # noqa: E402

from teacher_process import running  # noqa: E402
from tutelage.identity import tokenizer_digests, vocabulary_size  # noqa: E402
from tutelage.teacher_server.config import TeacherConfig  # noqa: E402
from tutelage.teacher_server.engine.cpu_affinity import cores_of  # noqa: E402
from tutelage.teacher_server.engine.vllm import prepare_environment  # noqa: E402
from tutelage.trainer.data.sequences import TokenSequence  # noqa: E402
from tutelage.trainer.teacher.base import SignalSpec  # noqa: E402
from tutelage.trainer.teacher.grpc_client import TeacherClient  # noqa: E402

K = 64
PROMISED = {"flat": 1.25, "prefill": 0.8}
SPIN_SECONDS = 1.5
"""Before each turn: vLLM's processes go on spinning for a second after their last work, on cores of the next."""
Side = Callable[[list[list[int]]], None]


def start_vllm(config: TeacherConfig, cores: str | None = None) -> Any:
    """The engine that people use in-process, with what the server gives its own; on all cores but one by default."""
    prepare_environment(config)
    default = cores_of("score", config, sorted(os.sched_getaffinity(0)))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores or ",".join(map(str, default))
    from vllm import LLM

    return LLM(
        model=config.model,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=2048,  # vLLM's own default
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=2**30,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_logprobs=K,
        disable_log_stats=True,
    )


def vllm_side(llm: Any, k: int | None) -> Side:
    """`generate` with or without the log-probabilities of the prompt."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=k, flat_logprobs=k is not None, detokenize=False
    )

    def generate(sequences: list[list[int]]) -> None:
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        assert len(outputs) == len(sequences)

    return generate


def our_side(client: TeacherClient) -> Side:
    """The signals of all sequences, as a trainer gets them."""
    spec = SignalSpec("topk", k=K, temperatures=(1.0,))

    def score(sequences: list[list[int]]) -> None:
        requests = [TokenSequence(np.array(ids, dtype=np.int32), 0, len(ids)) for ids in sequences]
        assert all(signals["logits_RK"].shape[1] == K for signals in client.score(requests, spec))

    return score


def processor_seconds() -> dict[str, float]:
    """Processor time so far of this process and what it started, by name and id."""
    used = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        times = process.cpu_times()
        used[f"{process.name()} {process.pid}"] = times.user + times.system
    return used


def measure(sides: dict[str, Side], options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Tokens a second of every round, and processor seconds of every process, by side."""
    generator = np.random.default_rng(0)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    spent: dict[str, dict[str, float]] = {name: defaultdict(float) for name in sides}
    for round_number in range(-1, options.rounds):  # the first warms up
        shape = (options.sequences, options.tokens)
        sequences = generator.integers(3, vocabulary_size(options.model), shape).tolist()
        names = list(sides)
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            time.sleep(SPIN_SECONDS)
            before, started = processor_seconds(), time.perf_counter()
            sides[name](sequences)
            seconds = time.perf_counter() - started
            if round_number >= 0:
                rates[name].append(options.sequences * options.tokens / seconds)
                for process, used in processor_seconds().items():
                    spent[name][process] += used - before.get(process, 0.0)
    return rates, spent


def median_and_range(values: np.ndarray) -> tuple[float, float, float]:
    """The median, and the 2.5th and 97.5th percentile of medians of as many values drawn from these."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def report(rates: dict[str, list[float]], spent: dict[str, dict], options: argparse.Namespace) -> bool:
    """Prints the tables; whether all promises are kept."""
    for name, values in rates.items():
        print(f"{name:<8} {statistics.median(values):8.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
    kept = True
    for other in [name for name in rates if name != "ours"]:
        ratio, low, high = median_and_range(np.divide(rates["ours"], rates[other]))
        promise = PROMISED.get(other, 0.0)
        kept &= ratio >= promise
        verdict = f"{'ok' if ratio >= promise else 'NO'}, promised {promise}" if promise else ""
        print(f"ours / {other:<8} {ratio:6.2f} ({low:.2f} to {high:.2f})  {verdict}")
    tokens = options.rounds * options.sequences * options.tokens
    print("\nprocessor milliseconds a token, by process:")
    for name, used in spent.items():
        parts = {
            process: 1000 * seconds / tokens for process, seconds in used.items() if seconds > 0.005 * tokens / 1e3
        }
        print(f"{name:<8} " + ", ".join(f"{process} {value:.3f}" for process, value in parts.items()))
    return kept


def main() -> int:
    """Starts both engines, then lets the sides take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, default=PACKAGED)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--score-engines", default="2")
    parser.add_argument("--head-threads", default="1")
    parser.add_argument("--vllm-cores", metavar="CORES")
    parser.add_argument("--against", metavar="OPTIONS", help="of a second server that takes turns too")
    options = parser.parse_args()
    config = TeacherConfig(model=str(options.model), max_model_len=512)
    threads = ("--score-engines", options.score_engines, "--head-threads", options.head_threads)
    given = {"ours": threads} | ({} if options.against is None else {"against": options.against.split()})
    length = ("--max-model-len", str(config.max_model_len))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            name: stack.enter_context(running(Path(folder) / name, options.model, *length, *flags))
            for name, flags in given.items()
        }
        # Before the clients: gRPC does not survive a fork.
        llm = start_vllm(config, options.vllm_cores)
        sides: dict[str, Side] = {}
        for name, server in servers.items():
            digests = tokenizer_digests(options.model)
            client = TeacherClient(server.address, student_id=name, wait_seconds=120, tokenizer_digests=digests)
            sides[name] = our_side(stack.enter_context(client))
        sides |= {"flat": vllm_side(llm, K), "prefill": vllm_side(llm, None)}
        kept = report(*measure(sides, options), options)
        llm.llm_engine.engine_core.shutdown()
    return not kept


if __name__ == "__main__":
    sys.exit(main())
