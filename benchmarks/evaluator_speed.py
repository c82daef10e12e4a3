"""Is the evaluator twice as fast as what people would use instead? Same items, model, dtype and threads, in one run.

python benchmarks/evaluator_speed.py [--loglik-items 400] [--generate-items 100] [--dtype bfloat16] [--profile]

`loglik`: ARC-Easy against lm-evaluation-harness 0.4.13 with its transformers backend, at the better of two batch
sizes. `paper`: AddSub with 64 new tokens, greedy, against transformers' `generate` on left-padded batches, at the
better of two batch sizes, each round in a process of its own. Loading is left out on both sides; so is the first
batch, which warms up. Rounds alternate between the sides, and each side has its fastest round, because the
machine may be shared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluator_parity import lines_of
from harness_environment import data_dir, run_harness
from packaged_models import PACKAGED, model_folder

from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine
from tutelage.evaluator.models.registry import open_engine
from tutelage.evaluator.models.transformers_engine import TransformersEngine
from tutelage.evaluator.protocols import loglik, paper
from tutelage.evaluator.tasks import TASKS

NEW_TOKENS = 64
BATCH_SIZES = (16, 32)


def seconds_of(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def our_loglik(engine: Engine, count: int) -> float:
    """Items a second, everything but the loading included."""
    task, settings = TASKS["ARC-Easy"], EvaluationSettings()
    items = task.items(data_dir(), count)

    def work() -> None:
        questions = [loglik.prepare(task, item, engine, settings) for item in items]
        questions.sort(key=lambda question: question.tokens)
        for start in range(0, count, engine.batch_size):
            loglik.answer(task, questions[start : start + engine.batch_size], engine, settings)

    return count / seconds_of(work)


def their_loglik(options: argparse.Namespace, batch_size: int) -> float:
    """Items a second of the harness, by its own clock after loading."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.jsonl"
        flags = ["--tasks", "arc_easy", "--limit", str(options.loglik_items), "--dtype", options.dtype]
        flags += ["--batch-size", str(batch_size), "--model", str(options.model), "--out", str(out)]
        run_harness("score", *flags, threads=options.threads)
        return float(options.loglik_items / lines_of(out)[-1]["seconds"])


def prompts_of(engine: Engine, count: int) -> list[list[int]]:
    """Shortest first, as the evaluator cuts its batches."""
    task, settings = TASKS["AddSub"], EvaluationSettings(max_new_tokens=NEW_TOKENS)
    questions = [paper.prepare(task, item, engine, settings) for item in task.items(data_dir(), count)]
    return sorted((question.prompt_ids for question in questions), key=len)


def our_generation(engine: Engine, prompts: list[list[int]]) -> float:
    """Items a second."""
    sampling = paper.sampling_of(TASKS["AddSub"], EvaluationSettings(max_new_tokens=NEW_TOKENS))

    def work() -> None:
        for start in range(0, len(prompts), engine.batch_size):
            batch = prompts[start : start + engine.batch_size]
            engine.generate(batch, [0] * len(batch), sampling)

    return len(prompts) / seconds_of(work)


def plain_generation(model: Any, prompts: list[list[int]], batch_size: int) -> float:
    """Items a second of `generate`, shortest first, left-padded."""

    def work() -> None:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            with torch.inference_mode():
                model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)

    return len(prompts) / seconds_of(work)


def plain_model(options: argparse.Namespace) -> Any:
    """The model as people load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()


def report(name: str, theirs: float, ours: float) -> None:
    """One line of the table."""
    print(f"| {name} | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} |", flush=True)


def compare_loglik(options: argparse.Namespace) -> None:
    """ARC-Easy, both sides alternating."""
    engine = TransformersEngine(options.model, dtype=options.dtype, batch_size=32)
    our_loglik(engine, 32)
    ours, theirs = 0.0, 0.0
    for batch_size in BATCH_SIZES:
        ours = max(ours, our_loglik(engine, options.loglik_items))
        theirs = max(theirs, their_loglik(options, batch_size))
    report(f"loglik, ARC-Easy, {options.loglik_items} items", theirs, ours)


def compare_generation(options: argparse.Namespace) -> None:
    """AddSub; every round of either side in a process of its own, which has the machine for itself."""
    ours, theirs = 0.0, 0.0
    for batch_size in BATCH_SIZES:
        theirs = max(theirs, in_a_process(f"--plain-batch-size={batch_size}"))
        ours = max(ours, in_a_process("--generation-only"))
    report(f"paper, AddSub, {options.generate_items} items, {options.engine}", theirs, ours)


def in_a_process(flag: str) -> float:
    """What this command answers with that flag besides its own."""
    command = [sys.executable, __file__, *sys.argv[1:], flag]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(answer.splitlines()[-1])


def generation_side(options: argparse.Namespace) -> float:
    """Items a second of one side."""
    settings = EvaluationSettings(engine=options.engine)
    batch_size = options.batch_size or settings.engine_batch_size
    engine = open_engine(options.engine, options.model, dtype=options.dtype, batch_size=batch_size)
    prompts = prompts_of(engine, options.generate_items)
    if options.plain_batch_size:
        model = plain_model(options)
        plain_generation(model, prompts[:8], 8)
        return plain_generation(model, prompts, options.plain_batch_size)
    our_generation(engine, prompts[:8])
    if options.profile:
        profile(engine, prompts)
    rate = our_generation(engine, prompts)
    engine.close()
    return rate


def profile(engine: Engine, prompts: list[list[int]]) -> None:
    """Where the time of one batch goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as profiled:
        our_generation(engine, prompts[: engine.batch_size])
    print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def main() -> None:
    """Prints items a second and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_folder, default=PACKAGED)
    parser.add_argument("--loglik-items", type=int, default=400)
    parser.add_argument("--generate-items", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--engine", default="vllm", choices=["transformers", "vllm"], help="ours, for generation")
    parser.add_argument("--batch-size", type=int, help="ours, for generation; by default as the evaluator's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--profile", action="store_true", help="also where the time of our generation goes")
    parser.add_argument("--generation-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain-batch-size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.generation_only or options.plain_batch_size:
        print(generation_side(options))
        return
    print(f"{options.dtype}, {options.threads} threads; items a second\n")
    print("| protocol | theirs | ours | ratio |\n|---|---|---|---|")
    if options.loglik_items:
        compare_loglik(options)
    if options.generate_items:
        compare_generation(options)


if __name__ == "__main__":
    main()
