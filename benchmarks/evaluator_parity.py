"""Are our `loglik` scores and gsm8k extractions lm-evaluation-harness 0.4.13's? Item by item, in float32.

python benchmarks/evaluator_parity.py [--items 200] [--tasks arc_easy,piqa] [--parts requests,extractions,scores]

The harness runs in an environment of its own on the hub's documents; we run on the LLM-Adapters files. Compared are
the text of every request of every item (no model needed), every choice's log-probability, the decisions of `acc`
and `acc_norm`, and what the two filters of gsm8k read from the same outputs. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness_environment import BUILD, data_dir, run_harness
from packaged_models import PACKAGED, model_folder

from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine
from tutelage.evaluator.models.transformers_engine import TransformersEngine
from tutelage.evaluator.protocols import loglik, paper
from tutelage.evaluator.results.lm_eval import gsm8k_exact_match, gsm8k_flexible, gsm8k_strict
from tutelage.evaluator.scoring.numbers import canonical_number
from tutelage.evaluator.tasks import TASKS
from tutelage.identity import weights_digest

OURS = {
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "piqa": "piqa",
    "openbookqa": "openbookqa",
    "social_iqa": "social_i_qa",
    "winogrande": "winogrande",
    "hellaswag": "hellaswag",
}
TOLERANCE = 1e-3  # nats
BATCH_SIZE = 32
EXTRACTED_ITEMS = 20
HAND_MADE = (
    "#### 42",
    "#### -3.5. Then 7",
    "#### 1,234\n#### 5",
    "####42",
    "so #### $18",
    "The answer is $1,234.",
    "The answer is 18.0",
    "16-12",
    "x = -5",
    "She ate 3/4",
    "half, that is .5",
    "50%",
    "...",
    "1.2.3",
    "$",
    "#### .",
    "",
    "none",
    "7\n\nQuestion: and 8?",
    "9,",
    "-",
    "#### ,",
    "a1b22c333",
    "1 000",
    "3-4 -56",
)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_requests(folder: Path, tasks: list[str], threads: int) -> bool:
    """Context and continuation of every choice of every item of the whole test sets."""
    run_harness("requests", "--tasks", ",".join(tasks), "--out", str(folder / "requests.jsonl"), threads=threads)
    theirs = lines_of(folder / "requests.jsonl")
    passed = True
    for task in tasks:
        ours = [TASKS[OURS[task]].choices(item) for item in TASKS[OURS[task]].items(data_dir())]
        pairs = [[list(pair) for pair in zip(one.contexts, one.continuations, strict=True)] for one in ours]
        wanted = [line["requests"] for line in theirs if line["task"] == task]
        same = sum(a == b for a, b in zip(pairs, wanted, strict=True))
        for index, (mine, its) in enumerate(zip(pairs, wanted, strict=True)):
            if mine != its:
                print(f"  {task} item {index}:\n    ours   {mine[0]}\n    theirs {its[0]}", file=sys.stderr)
        print(f"| {task} | {len(wanted)} | {same} |", flush=True)
        passed &= same == len(wanted)
    return passed


def our_scores(engine: Engine, task: str, count: int) -> list[dict[str, Any]]:
    """Rows of the first items, in order."""
    settings = EvaluationSettings(dtype="float32")
    ours = TASKS[OURS[task]]
    questions = [loglik.prepare(ours, item, engine, settings) for item in ours.items(data_dir(), count)]
    by_length = sorted(questions, key=lambda question: question.tokens)
    rows: dict[str, dict[str, Any]] = {}
    for start in range(0, len(by_length), BATCH_SIZE):
        batch = by_length[start : start + BATCH_SIZE]
        answers = loglik.answer(ours, batch, engine, settings)
        rows |= {question.item.item_id: answer for question, answer in zip(batch, answers, strict=True)}
    return [rows[question.item.item_id] for question in questions]


def same_scores(tasks: list[str], options: argparse.Namespace) -> bool:
    """Log-probabilities and decisions of the first items."""
    engine = TransformersEngine(options.model, dtype="float32", batch_size=BATCH_SIZE)
    same = [compare(task, their_scores(task, options), our_scores(engine, task, options.items)) for task in tasks]
    return all(same)


def their_scores(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The harness's, kept below `build/` because they take it many minutes; delete the folder to do them again."""
    model = weights_digest(options.model)[:16]
    kept = BUILD / "evaluator_parity" / f"{task}-{options.items}-{model}.jsonl"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        flags = ["--model", str(options.model), "--limit", str(options.items), "--dtype", "float32"]
        out = kept.with_suffix(".part")
        run_harness("score", *flags, "--tasks", task, "--out", str(out), threads=options.threads)
        out.replace(kept)
    return lines_of(kept)[:-1]


def compare(task: str, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> bool:
    """One line of the table."""
    pairs = list(zip(ours, theirs, strict=True))
    gaps = [abs(a - b) for mine, its in pairs for a, b in zip(mine["choices_logp"], its["logp"], strict=True)]
    acc = sum(mine["score"] != its["acc"] for mine, its in pairs)
    has_norm = theirs[0]["acc_norm"] is not None
    norm = sum(mine["score_normalized"] != its["acc_norm"] for mine, its in pairs) if has_norm else 0
    ours_acc = sum(mine["score"] for mine in ours) / len(ours)
    print(
        f"| {task} | {len(pairs)} | {len(gaps)} | {max(gaps):.1e} | {acc} | {norm if has_norm else '–'} | "
        f"{ours_acc:.4f} |",
        flush=True,
    )
    return max(gaps) <= TOLERANCE and acc == norm == 0


def gsm8k_outputs(model: Path) -> list[dict[str, str]]:
    """The hand-made outputs, each against two targets, and what the model writes after real questions."""
    made = [{"output": text, "target": target} for text in HAND_MADE for target in ("18", "1,234")]
    engine = TransformersEngine(model, dtype="float32", batch_size=EXTRACTED_ITEMS)
    task, settings = TASKS["gsm8k"], EvaluationSettings(prompt="chat", max_new_tokens=64)
    questions = [paper.prepare(task, item, engine, settings) for item in task.items(data_dir(), EXTRACTED_ITEMS)]
    completions = engine.generate(
        [one.prompt_ids for one in questions], [0] * EXTRACTED_ITEMS, paper.sampling_of(task, settings)
    )
    real = [
        {"output": completion.text, "target": canonical_number(float(question.item.target))}
        for question, completion in zip(questions, completions, strict=True)
    ]
    return made + real


def same_extractions(folder: Path, options: argparse.Namespace) -> bool:
    """gsm8k's strict and flexible filters, and whether what they read is right."""
    outputs = gsm8k_outputs(options.model)
    source, out = folder / "outputs.json", folder / "extracted.json"
    source.write_text(json.dumps(outputs), encoding="utf-8")
    run_harness("extract", "--outputs", str(source), "--out", str(out), threads=options.threads)
    theirs = json.loads(out.read_text(encoding="utf-8"))
    passed = True
    for name, extract in (("strict-match", gsm8k_strict), ("flexible-extract", gsm8k_flexible)):
        read = [extract(one["output"]) for one in outputs]
        right = [gsm8k_exact_match(text, one["target"]) for text, one in zip(read, outputs, strict=True)]
        same = sum([text, score] == its[name] for text, score, its in zip(read, right, theirs, strict=True))
        print(f"| {name} | {len(outputs)} | {same} |", flush=True)
        passed &= same == len(outputs)
    return passed


def main() -> int:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200, help="items of each task that the model scores")
    parser.add_argument("--tasks", default=",".join(OURS))
    parser.add_argument("--model", type=model_folder, default=PACKAGED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default="requests,extractions,scores", help="what is compared")
    options = parser.parse_args()
    tasks = options.tasks.split(",")
    passed = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "requests" in options.parts:
            print("| task | items | same requests |\n|---|---|---|")
            passed &= same_requests(folder, tasks, options.threads)
        if "extractions" in options.parts:
            print("\n| gsm8k filter | outputs | same |\n|---|---|---|")
            passed &= same_extractions(folder, options)
        if "scores" in options.parts:
            print("\n| task | items | choices | largest gap, nats | acc differs | acc_norm differs | acc |")
            print("|---|---|---|---|---|---|---|", flush=True)
            passed &= same_scores(tasks, options)
    print("\nsame" if passed else "\nDIFFERENT")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
