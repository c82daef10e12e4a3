"""lm-evaluation-harness 0.4.13: our rows in its files, and what its filters read from a gsm8k output.

    <out>/<model>/results_<date>.json
    <out>/<model>/samples_<task>_<date>.jsonl

as its EvaluationTracker writes them. Its samples are one JSON object an item and filter, its results one object an
evaluation with `<metric>,<filter>` and `<metric>_stderr,<filter>`. What we have no counterpart of is left out, not made
up.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from tutelage.evaluator.results.frames import read_files
from tutelage.evaluator.scoring.numbers import canonical_number
from tutelage.evaluator.tasks.base import Item, Task

INVALID = "[invalid]"
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def gsm8k_strict(output: str) -> str:
    """The number after the first "#### ", or `INVALID`: the filter `strict-match`."""
    found = _STRICT.search(output)
    return found.group(1).strip() if found else INVALID


def gsm8k_flexible(output: str) -> str:
    """The last run of digits, dots, commas and dollars, or `INVALID`: the filter `flexible-extract`."""
    found = [match.group() for match in _FLEXIBLE.finditer(output)]
    return found[-1].strip() if found else INVALID


def gsm8k_exact_match(extracted: str, target: str) -> float:
    """1.0 if both are equal without commas, dollars, what stands up to "#### ", a last dot, and case."""
    return float(_bare(extracted) == _bare(target))


def _bare(text: str) -> str:
    text = text.replace(",", "").replace("$", "")
    marker = text.rfind("#### ")
    text = text[marker + len("#### ") :] if marker >= 0 else text
    return re.sub(r"\.$", "", text).lower()


def write(files: Sequence[Path], out: Path, tasks: Mapping[str, Task], data_dir: Path | None) -> list[Path]:
    """Writes the results and samples of one evaluation; what the same rows gave before is replaced.

    Args:
        files: the frames of one evaluation.
        out: the harness's `--output_path`.
        tasks: by the names in the rows; of others there are no documents.
        data_dir: folder of their data; without it there are no documents either.

    Returns:
        the files, the results first.

    """
    rows = read_files(files).collect()
    folder = out / model_folder(rows["checkpoint"][0])
    folder.mkdir(parents=True, exist_ok=True)
    written = datetime.fromtimestamp(max(file.stat().st_mtime for file in files))
    date = written.isoformat().replace(":", "-")
    paths = [folder / f"results_{date}.json"]
    content = {**results(rows, tasks), "date": written.timestamp()}
    paths[0].write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for (name, protocol), part in rows.group_by("task", "protocol", maintain_order=True):
        task = tasks.get(str(name))
        items = [] if task is None or task.missing(data_dir) else task.items(data_dir)
        lines = samples(part, task, {item.item_hash: item for item in items})
        path = folder / f"samples_{task_name(str(name), str(protocol), tasks)}_{date}.jsonl"
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        paths.append(path)
    return paths


def model_folder(name: str) -> str:
    """What the harness calls a model's folder (its `sanitize_model_name`), within what a file system takes."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", name)[-200:]


def samples(
    rows: pl.DataFrame, task: Task | None = None, items: Mapping[str, Item] | None = None
) -> Iterator[dict[str, Any]]:
    """The harness's samples of the rows of one evaluation of one task under one protocol; failed items are left out.

    Args:
        rows: of one task and protocol.
        task: for the choices that were scored.
        items: by their hashes, for the documents.

    """
    for row in rows.filter(pl.col("error") == "").to_dicts():
        item = (items or {}).get(row["item_hash"])
        # Texts, as in its own files. A choice is (log-probability, whether greedy); the latter is not known.
        logps = row["choices_logp"]
        responses = [[row["output"]]] if logps is None else [[[str(logp), "None"]] for logp in logps]
        for name, reading, scores in _readings(row):
            yield {
                "doc_id": int(row["item_id"]),
                "doc": _document(row, item),
                "target": row["target"],
                **_arguments(row, task, item),
                "resps": responses,
                "filtered_resps": reading,
                "filter": name,
                "metrics": list(scores),
                "doc_hash": row["item_hash"],
                "prompt_hash": row["prompt_hash"],
                "target_hash": hashlib.sha256(row["target"].encode()).hexdigest(),
                **scores,
            }


def _document(row: Mapping[str, Any], item: Item | None) -> dict[str, Any]:
    if item is None:
        return {"item_hash": row["item_hash"]}
    return {"instruction": item.instruction, "input": item.input, "answer": item.target, "item_hash": item.item_hash}


def _arguments(row: Mapping[str, Any], task: Task | None, item: Item | None) -> dict[str, Any]:
    """The requests that were scored; the text of a prompt is not kept, only its hash."""
    if row["protocol"] != "loglik" or item is None or task is None or task.choices is None:
        return {}
    choices = task.choices(item)
    pairs = zip(choices.contexts, choices.continuations, strict=True)
    return {"arguments": {f"gen_args_{n}": {"arg_0": first, "arg_1": then} for n, (first, then) in enumerate(pairs)}}


def _readings(row: dict[str, Any]) -> Iterator[tuple[str, list[Any], dict[str, float | None]]]:
    """Filter, what it read, and the scores, once a filter."""
    if row["protocol"] == "loglik":
        scores = {"acc": row["score"], "acc_norm": row["score_normalized"]}
        yield "none", [[str(logp), "None"] for logp in row["choices_logp"]], scores
    elif row["protocol"] == "open":
        yield "none", [row["output"]], {row["metric"]: row["score"]}
    else:
        yield "paper", [row["extracted"]], {"exact_match": row["score"]}
        yield "corrected", [row["extracted_corrected"]], {"exact_match": row["score_corrected"]}
        if row["task"] == "gsm8k":
            target = canonical_number(float(row["target"]))
            for name, read in (("strict-match", gsm8k_strict), ("flexible-extract", gsm8k_flexible)):
                reading = read(row["output"])
                yield name, [reading], {"exact_match": gsm8k_exact_match(reading, target)}


def results(rows: pl.DataFrame, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The harness's results of the rows of one evaluation."""
    first = rows.row(0, named=True)
    content: dict[str, dict[str, Any]] = {
        key: {}
        for key in ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    }
    for (task, protocol), part in rows.group_by("task", "protocol", maintain_order=True):
        name, known = task_name(str(task), str(protocol), tasks), tasks.get(str(task))
        effective = part.filter(pl.col("error") == "")["item_id"].n_unique()
        lines = list(samples(part))
        metrics = {metric: True for line in lines for metric in line["metrics"]}
        content["results"][name] = {"name": name, "alias": name, "sample_len": effective, **_means(lines)}
        content["group_subtasks"][name] = []
        content["configs"][name] = {
            "task": name,
            "dataset_path": known.source if known else str(task),
            "output_type": "multiple_choice" if protocol == "loglik" else "generate_until",
            "num_fewshot": 0,
            "metric_list": [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in metrics],
            "metadata": {"version": part["task_version"][0], "protocol": protocol, "template": part["template"][0]},
        }
        content["versions"][name] = part["task_version"][0]
        content["n-shot"][name] = 0
        content["higher_is_better"][name] = metrics
        content["n-samples"][name] = {"original": known.count if known else effective, "effective": effective}
    return {
        **content,
        "config": {
            "model": first["engine"],
            "model_args": {"pretrained": first["checkpoint"], "dtype": first["dtype"]},
            "random_seed": first["seed"],
        },
        "model_source": first["engine"],
        "model_name": first["checkpoint"],
        "model_name_sanitized": model_folder(first["checkpoint"]),
    }


def task_name(task: str, protocol: str, tasks: Mapping[str, Task]) -> str:
    """The task's key in the harness's files: its own where it makes the same requests, else ours and the protocol."""
    theirs = tasks[task].harness_name if protocol == "loglik" and task in tasks else ""
    return theirs or f"{task}_{protocol}"


def _means(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`<metric>,<filter>` and its standard error, over the samples."""
    values: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        for metric in line["metrics"]:
            if line[metric] is not None:
                values.setdefault((metric, line["filter"]), []).append(line[metric])
    means: dict[str, float] = {}
    for (metric, name), scores in values.items():
        mean = sum(scores) / len(scores)
        means[f"{metric},{name}"] = mean
        if len(scores) > 1:  # `mean_stderr` of the harness: the sample standard deviation over the square root of n
            variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
            means[f"{metric}_stderr,{name}"] = (variance / len(scores)) ** 0.5
    return means
