"""Our loop, transformers' own generation, vLLM with the student's weights: seconds that a batch of sequences takes.

    python benchmarks/sampler_speed.py [--batches 8 32] [--rounds 5] [--threads 2] [--model DIR]

The packaged 8-layer student (57M) in bfloat16, prompts of 40 to 60 tokens, 64 new tokens (no sequence ends earlier),
temperature 1. All are in this process and have the same weights and threads; they write the same prompts in turn. Of
transformers there is `generate` with its growing cache and with a static one, and `generate_batch`, its continuous
batching, with the attention that it knows; all three draw with `torch.multinomial`. vLLM's time includes taking the
weights, which it does before each batch; that part is also measured alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "proto")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil  # noqa: E402
import torch  # noqa: E402
from trainer_speed import BUILD, EndlessStudent, write_prompts  # noqa: E402
from transformers import ContinuousBatchingConfig, GenerationConfig  # noqa: E402

from tutelage.identity import vocabulary_size  # noqa: E402
from tutelage.studies.prepare_models import prepare  # noqa: E402
from tutelage.trainer.config.student import StudentConfig  # noqa: E402
from tutelage.trainer.data.dataset import read_dataset  # noqa: E402
from tutelage.trainer.data.sequences import TokenIds  # noqa: E402
from tutelage.trainer.rollout.base import Sampler  # noqa: E402
from tutelage.trainer.rollout.hf_sampler import TransformersSampler  # noqa: E402
from tutelage.trainer.rollout.vllm_sampler import VllmSampler  # noqa: E402

WARM_UP_ROUNDS = 1


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


def _settings(new_tokens: int, **more: Any) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=new_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, **more
    )


def generate(model: Any, prompts: Sequence[TokenIds], new_tokens: int, **more: Any) -> None:
    """Writes with `generate`; prompts stand on the right of their rows."""
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt.tolist() for prompt in prompts])
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written_BT = model.generate(ids_BT, attention_mask=mask_BT, generation_config=_settings(new_tokens, **more))
    assert written_BT.shape[1] == width + new_tokens


def generate_batch(model: Any, prompts: Sequence[TokenIds], new_tokens: int) -> None:
    """Writes with continuous batching, whose cache has room for all of them."""
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    blocks = sum(-(-(len(prompt) + new_tokens) // 32) for prompt in prompts)
    room = ContinuousBatchingConfig(page_size=32, num_blocks=blocks + 8, max_batch_tokens=sum(map(len, prompts)))
    written = model.generate_batch(
        [prompt.tolist() for prompt in prompts], _settings(new_tokens, eos_token_id=-1), room, warmup=False
    )
    assert [len(each.generated_tokens) for each in written.values()] == [new_tokens] * len(prompts)
    model.set_attn_implementation(own)


GENERATIONS: dict[str, Callable[[Any, Sequence[TokenIds], int], None]] = {
    "generate": generate,
    "generate, static cache": partial(generate, cache_implementation="static"),
    "generate_batch": generate_batch,
}


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
    samplers: dict[str, Sampler] = {"ours": TransformersSampler(config, student)}
    if not options.without_vllm:
        before_mib, started = resident_mib(), time.perf_counter()
        samplers["vllm"] = VllmSampler(config, student)
        seconds_to_start, mib = time.perf_counter() - started, resident_mib() - before_mib
        print(f"vLLM started in {seconds_to_start:.0f} s and took {mib:.0f} MiB", flush=True)
    table = []
    for batch in options.batches:
        prompts = [example.prompt_ids for example in examples[:batch]]
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        for number in range(WARM_UP_ROUNDS + options.rounds):
            batch_indices = range(len(prompts))
            taken = {}
            for name, one in samplers.items():
                one.take_weights(number)
                taken[name] = seconds_of(partial(one.write, number, batch_indices, prompts))
            student.model.eval()
            for name, generate in GENERATIONS.items():
                taken[name] = seconds_of(partial(generate, student.model, prompts, options.new_tokens))
            student.model.train()
            if isinstance(vllm := samplers.get("vllm"), VllmSampler):
                taken["refresh"] = seconds_of(vllm.refresh)
            print(f"batch {batch}: " + ", ".join(f"{name} {value:.2f} s" for name, value in taken.items()), flush=True)
            if number >= WARM_UP_ROUNDS:
                for name, value in taken.items():
                    seconds[name].append(value)
        table.append((batch, seconds))
    report(table, options.new_tokens)


def report(table: list[tuple[int, Mapping[str, list[float]]]], new_tokens: int) -> None:
    """Medians with ranges, and what of ours the time is."""
    print("\n| sequences | | seconds (tokens a second) | of our time |\n|---|---|---|---|")
    for batch, seconds in table:
        median = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            rate = f"{batch * new_tokens / median[name]:.0f}"
            print(
                f"| {batch} | {name} | {median[name]:.2f}, {min(values):.2f} to {max(values):.2f} ({rate}) | "
                f"{median[name] / median['ours']:.2f} |"
            )


def main() -> None:
    """Prints seconds a batch of both samplers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="sequences written at once")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="cores of this process")
    parser.add_argument("--without-vllm", action="store_true", help="the others only")
    parser.add_argument("--model", type=Path, help="another student; default: the packaged one")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    with tempfile.TemporaryDirectory() as folder:
        compare(options, options.model or prepare(BUILD / "models")[1], Path(folder))


if __name__ == "__main__":
    main()
