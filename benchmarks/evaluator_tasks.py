"""All 14 tasks of the study end to end for one checkpoint, on the first items of the real test files; prints a table.

python benchmarks/evaluator_tasks.py [--items 50] [--model build/models/teacher] [--out build/evaluator_tasks]

`paper` greedily with LLM-Adapters' own prompt, `loglik` where the task has choices. Rows stay in `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness_environment import BUILD, data_dir
from packaged_models import PACKAGED, model_folder

from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.results.frames import read, summarize
from tutelage.evaluator.runner.evaluation import Progress, evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.evaluator.tasks import TASKS

NAMES = tuple(name for name, task in TASKS.items() if task.extraction is not None and name != "arithmetic")


def main() -> None:
    """Evaluates (a second call takes finished batches as they are) and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--model", type=model_folder, default=PACKAGED)
    parser.add_argument("--out", type=Path, default=BUILD / "evaluator_tasks")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()
    requests = tuple(TaskRequest(name, protocol, options.items) for name in NAMES for protocol in TASKS[name].protocols)
    evaluation = Evaluation(f"tasks.{options.model.name}", options.model, Labels("tasks", options.model.name), requests)
    settings = EvaluationSettings(data_dir=data_dir(), max_new_tokens=options.max_new_tokens)
    evaluate(evaluation, settings, options.out, on_progress=show)
    print("\n| task | protocol | chance, % | score, % | corrected extraction / acc_norm, % | n | unparsable | failed |")
    print("|---|---|---|---|---|---|---|---|")
    rows = {(row["task"], row["protocol"]): row for row in summarize(read(options.out)).collect().to_dicts()}
    for name in NAMES:
        for protocol in TASKS[name].protocols:
            print(line(name, protocol, rows[name, protocol]))


def show(progress: Progress) -> None:
    """How far it is."""
    print(f"{progress.done} of {progress.total}, {progress.items_per_second:.2f} items/s", end="\r", flush=True)


def line(name: str, protocol: str, row: dict[str, float]) -> str:
    """One line of the table."""
    second = row["score_corrected"] if protocol == "paper" else row["score_normalized"]
    return (
        f"| {name} | {protocol} | {100 * TASKS[name].chance(protocol):.0f} | "
        f"{100 * row['score']:.1f} ± {100 * row['standard_error']:.1f} | {100 * second:.1f} | {row['n']} | "
        f"{row['unparsable'] if protocol == 'paper' else '–'} | {row['failed']} |"
    )


if __name__ == "__main__":
    main()
