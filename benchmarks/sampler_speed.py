"""Which writes a student's own sequences faster, the trained model or vLLM with its weights? In turn, in one run.

    python benchmarks/sampler_speed.py [--batches 8 32] [--rounds 5] [--threads 2] [--model DIR]

The packaged 8-layer student (57M) in bfloat16, prompts of 40 to 60 tokens, 64 new tokens (no sequence ends earlier),
temperature 1. Both samplers are in this process and have the same weights and threads; they write the same prompts in
turn. vLLM's time includes taking the weights, which it does before each batch; that part is also measured alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil  # noqa: E402
import torch  # noqa: E402
from trainer_speed import BUILD, write_prompts  # noqa: E402

from tutelage.identity import vocabulary_size  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.config.student import StudentConfig  # noqa: E402
from tutelage.trainer.data.dataset import read_dataset  # noqa: E402
from tutelage.trainer.model.student import Student  # noqa: E402
from tutelage.trainer.rollout.hf_sampler import TransformersSampler  # noqa: E402
from tutelage.trainer.rollout.vllm_sampler import VllmSampler  # noqa: E402

WARM_UP_ROUNDS = 1


class EndlessStudent(Student):
    """No token ends a sequence, so that both samplers write the same number of tokens."""

    @property
    def end_ids(self) -> frozenset[int]:
        """None."""
        return frozenset()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall clock of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def config_of(model: Path, prompts: Path, options: argparse.Namespace) -> StudentConfig:
    """A student that writes as many tokens as are asked for."""
    return StudentConfig.model_validate(
        {
            "id": "speed",
            "init": model,
            "data": {"path": prompts},
            "sampling": {"engine": "vllm", "max_new_tokens": options.new_tokens},
            "batch": {"sequences": max(options.batches), "max_tokens": 256},
            "threads": options.threads,
        }
    )


def resident_mib() -> float:
    """Memory of this process."""
    return psutil.Process().memory_info().rss / 2**20


def compare(options: argparse.Namespace, model: Path, folder: Path) -> None:
    """Batches in turn, then the table."""
    config = config_of(model, write_prompts(folder / "prompts.jsonl", max(options.batches)), options)
    torch.set_num_threads(config.threads)
    size = vocabulary_size(model)
    student = EndlessStudent(model, dtype=config.dtype, optimizer=config.optimizer, vocabulary_size=size)
    examples = read_dataset(
        config.data.path, student.tokenizer, template="chat", max_tokens=config.batch.max_tokens
    ).examples
    before_mib = resident_mib()
    started = time.perf_counter()
    vllm = VllmSampler(config, student)
    started_seconds = time.perf_counter() - started
    samplers = {"transformers": TransformersSampler(config, student), "vllm": vllm}
    table = []
    for batch in options.batches:
        prompts = [example.prompt_ids for example in examples[:batch]]
        seconds: dict[str, list[float]] = {"transformers": [], "vllm": [], "refresh": []}
        for number in range(WARM_UP_ROUNDS + options.rounds):
            batch_indices = range(len(prompts))
            taken = {}
            for name, one in samplers.items():
                one.take_weights(number)
                taken[name] = seconds_of(partial(one.write, number, batch_indices, prompts))
            taken["refresh"] = seconds_of(vllm.refresh)
            print(f"batch {batch}: " + ", ".join(f"{name} {value:.2f} s" for name, value in taken.items()), flush=True)
            if number >= WARM_UP_ROUNDS:
                for name, value in taken.items():
                    seconds[name].append(value)
        table.append((batch, seconds))
    report(table, options.new_tokens)
    print(f"\nvLLM started in {started_seconds:.0f} s and took {resident_mib() - before_mib:.0f} MiB")


def report(table: list[tuple[int, dict[str, list[float]]]], new_tokens: int) -> None:
    """Medians with ranges, and the ratio."""
    print("\n| sequences | transformers, s (tokens a second) | vllm, s (tokens a second) | of it the refresh | ratio |")
    print("|---|---|---|---|---|")
    for batch, seconds in table:
        median = {name: statistics.median(values) for name, values in seconds.items()}
        cells = [
            f"{median[name]:.2f} ({min(seconds[name]):.2f} to {max(seconds[name]):.2f}; "
            f"{batch * new_tokens / median[name]:.0f})"
            for name in ("transformers", "vllm")
        ]
        ratio = median["transformers"] / median["vllm"]
        print(f"| {batch} | {cells[0]} | {cells[1]} | {median['refresh']:.2f} | {ratio:.2f} |")


def main() -> None:
    """Prints seconds a batch of both samplers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="sequences written at once")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores of this process")
    parser.add_argument("--model", type=Path, help="another student; default: the packaged one")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with tempfile.TemporaryDirectory() as folder:
        compare(options, options.model or prepare(BUILD / "models")[1], Path(folder))


if __name__ == "__main__":
    main()
