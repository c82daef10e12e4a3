"""What an engine on one core takes for a token, alone and beside the signal head's work on another.

    python benchmarks/teacher_engine.py [--rounds 32] [--sequences 8] [--tokens 256] [--model DIR]

    generate 2048   vLLM's plain prefill in batches of 2,048 tokens, as people use it
    states 2048     the hidden states of all tokens (the pooling runner), which the teacher asks for
    states 512      the same in batches of 512 tokens, as the teacher asks on a CPU

Each is an engine of its own in one process on the first core. Beside it the second core does nothing, or reduces random
hidden states to `topk` of k = 64 over and over. All six take turns, in an order that changes from round to round.
Printed are the engine's processor milliseconds a token, and the geometric mean of their ratios to plain prefill alone
in the same round, with its standard error.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from packaged_models import PACKAGED, model_folder  # noqa: E402
from teacher_speed import K, vllm_side  # noqa: E402

from tutelage.identity import vocabulary_size  # noqa: E402
from tutelage.teacher_server.config import TeacherConfig  # noqa: E402
from tutelage.teacher_server.engine.vllm import prepare_environment, scoring_arguments  # noqa: E402

ENGINES = {"generate 2048": ("generate", 2048), "states 2048": ("states", 2048), "states 512": ("states", 512)}
ROWS = 256
SETTLE_SECONDS = 0.3


def reduce_states(at_work: Any, config: TeacherConfig) -> None:
    """The signal head on the second core, while `at_work` is set; a process of its own."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[1:2])
    prepare_environment(config)
    import torch

    from tutelage.teacher_server.model.head_check import load_unembedding
    from tutelage.teacher_server.signals.logit_head import SignalHead, use_bfloat16_products

    torch.set_num_threads(1)
    use_bfloat16_products()
    head = SignalHead(load_unembedding(Path(config.model), vocabulary_size(Path(config.model))), device="cpu")
    hidden_RD = torch.randn(ROWS, head.hidden_size).bfloat16()
    while True:
        at_work.wait()
        head.topk(hidden_RD, list(range(ROWS - 1)), k=K, temperatures=[1.0])


def start_engine(kind: str, max_num_batched_tokens: int, config: TeacherConfig) -> Any:
    """An engine in one process, on the first core."""
    from vllm import LLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    scoring = scoring_arguments() | {"skip_tokenizer_init": False} if kind == "states" else {}
    return LLM(
        model=config.model,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=2**30,
        enforce_eager=True,
        disable_log_stats=True,
        distributed_executor_backend=UniProcExecutor,
        **({"enable_prefix_caching": False} | scoring),
    )


def engine_side(kind: str, llm: Any) -> Callable[[list[list[int]]], None]:
    """Computes all sequences."""
    if kind == "generate":
        return vllm_side(llm, None)
    from vllm import PoolingParams

    parameters = PoolingParams(task="token_embed", use_activation=False)

    def states(sequences: list[list[int]]) -> None:
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        llm.encode(prompts, parameters, use_tqdm=False, pooling_task="token_embed")

    return states


@contextmanager
def all_engines(config: TeacherConfig) -> Iterator[dict[str, Callable[[list[list[int]]], None]]]:
    """Every engine, on the first core; this process is on the second."""
    cores = sorted(os.sched_getaffinity(0))
    prepare_environment(config)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[0])
    started = []
    for kind, max_num_batched_tokens in ENGINES.values():
        os.sched_setaffinity(0, cores[:1])  # The engine's process inherits it.
        started.append(start_engine(kind, max_num_batched_tokens, config))
    os.sched_setaffinity(0, cores[1:2])
    try:
        yield {name: engine_side(ENGINES[name][0], llm) for name, llm in zip(ENGINES, started, strict=True)}
    finally:
        for llm in started:
            llm.llm_engine.engine_core.shutdown()


def engine_seconds() -> float:
    """Processor time of all engines so far."""
    engines = [child for child in psutil.Process().children(recursive=True) if "EngineCore" in child.name()]
    return sum(sum(engine.cpu_times()[:2]) for engine in engines)


def measure(options: argparse.Namespace, config: TeacherConfig) -> dict[tuple[str, bool], list[float]]:
    """Processor milliseconds a token of every round, by engine and whether the head was at work."""
    spawned = multiprocessing.get_context("spawn")
    at_work = spawned.Event()
    spawned.Process(target=reduce_states, args=(at_work, config), daemon=True).start()
    generator = np.random.default_rng(0)
    spent: dict[tuple[str, bool], list[float]] = {(name, beside): [] for beside in (False, True) for name in ENGINES}
    with all_engines(config) as engines:
        for number in range(-1, options.rounds):  # The first warms up.
            shape = (options.sequences, options.tokens)
            sequences = generator.integers(3, vocabulary_size(Path(config.model)), shape).tolist()
            turns = list(spent)
            for name, beside in turns[number % len(turns) :] + turns[: number % len(turns)]:
                (at_work.set if beside else at_work.clear)()
                time.sleep(SETTLE_SECONDS)
                before = engine_seconds()
                engines[name](sequences)
                if number >= 0:
                    spent[name, beside].append(1000 * (engine_seconds() - before) / np.prod(shape))
    return spent


def report(spent: dict[tuple[str, bool], list[float]]) -> None:
    """The table."""
    base = spent["generate 2048", False]
    print("| engine | the other core | ms a token (median) | to plain prefill alone |\n|---|---|---|---|")
    for (name, beside), values in spent.items():
        logs = np.log(np.divide(values, base))
        error = logs.std() / len(logs) ** 0.5
        ratio = f"{np.exp(logs.mean()):.2f} ± {error:.2f}" if values is not base else "1"
        print(f"| {name} | {'signal head' if beside else 'idle'} | {statistics.median(values):.3f} | {ratio} |")


def main() -> None:
    """Starts all engines, lets them take turns, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, default=PACKAGED)
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    report(measure(options, TeacherConfig(model=str(options.model), max_model_len=512)))


if __name__ == "__main__":
    main()
