"""lm-evaluation-harness 0.4.13: what its filters read from a gsm8k output, and our rows in its schema.

Its samples are one JSON object an item and filter, its results one object an evaluation with `<metric>,<filter>`
and `<metric>_stderr,<filter>`. What we have no counterpart of is left out, not made up.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import polars as pl

from tutelage.evaluator.scoring.extraction import canonical_number

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


def samples(rows: pl.DataFrame) -> Iterator[dict[str, Any]]:
    """The harness's samples of the rows of one evaluation of one task under one protocol; failed items are left out."""
    for row in rows.filter(pl.col("error") == "").to_dicts():
        # The harness has (log-probability, whether greedy) a choice; whether a choice is the greedy one is not known.
        logps = row["choices_logp"]
        responses = [[row["output"]]] if logps is None else [[[logp, None]] for logp in logps]
        for name, reading, scores in _readings(row):
            yield {
                "doc_id": int(row["item_id"]),
                "doc": {"item_hash": row["item_hash"]},
                "target": row["target"],
                "resps": responses,
                "filtered_resps": reading,
                "filter": name,
                "metrics": list(scores),
                "doc_hash": row["item_hash"],
                "prompt_hash": row["prompt_hash"],
                "target_hash": hashlib.sha256(row["target"].encode()).hexdigest(),
                **scores,
            }


def _readings(row: dict[str, Any]) -> Iterator[tuple[str, list[Any], dict[str, float | None]]]:
    """Filter, what it read, and the scores, once a filter."""
    if row["protocol"] == "loglik":
        scores = {"acc": row["score"], "acc_norm": row["score_normalized"]}
        yield "none", [[logp, None] for logp in row["choices_logp"]], scores
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


def results(rows: pl.DataFrame) -> dict[str, Any]:
    """The harness's results of the rows of one evaluation.

    Tasks carry our names, and `<name>_paper` or `<name>_open` where the harness has no such task.
    """
    first = rows.row(0, named=True)
    scores: dict[str, dict[str, Any]] = {}
    for (task, protocol), part in rows.group_by("task", "protocol", maintain_order=True):
        name = task_name(str(task), str(protocol))
        items = part.filter(pl.col("error") == "")["item_id"].n_unique()
        scores[name] = {"alias": name, "sample_len": items, **_means(samples(part))}
    versions = rows.select("task", "protocol", "task_version").unique().rows()
    return {
        "results": scores,
        "versions": {task_name(task, protocol): version for task, protocol, version in versions},
        "n-samples": {
            name: {"original": score["sample_len"], "effective": score["sample_len"]} for name, score in scores.items()
        },
        "config": {
            "model": first["engine"],
            "model_args": {"pretrained": first["checkpoint"], "dtype": first["dtype"]},
            "random_seed": first["seed"],
        },
        "model_name": first["checkpoint"],
    }


def task_name(task: str, protocol: str) -> str:
    """The task's key in the harness's results."""
    return task if protocol == "loglik" else f"{task}_{protocol}"


def _means(lines: Iterator[dict[str, Any]]) -> dict[str, float]:
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


def as_json_lines(lines: Iterator[dict[str, Any]]) -> str:
    """One line an object."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
