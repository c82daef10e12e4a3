"""What could make a run's numbers mean something else, seen in its settings and its rows before the first step.

`bad` is what certainly does and is refused; `note` is what may.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tutelage.data.dataset_files import TokenizedExample
from tutelage.data.prompts import completion_end_id
from tutelage.data.tokens import beginning_ids
from tutelage.errors import EXIT_DATA, EXIT_USAGE
from tutelage.files import write_durably
from tutelage.findings import Finding
from tutelage.trainer.config.student import SourceConfig, StudentConfig
from tutelage.trainer.data.dataset import Dataset, row_key
from tutelage.trainer.teacher.base import TeacherIdentity
from tutelage.trainer.training.sources import Data

FILE = "preflight.json"
_MUCH = 0.05
"""Share of rows that are left out or cut, from which on it is worth a note."""
_LAST = 3
"""Tokens at the end of a completion among which its end token is looked for: templates write a line end after it."""


def findings_of(config: StudentConfig, tokenizer: Any, data: Data, teacher_ends: Sequence[int] = ()) -> list[Finding]:
    """What there is to say of a student's settings and data, in order.

    Args:
        config: the student's.
        tokenizer: the student's.
        data: as it is trained on.
        teacher_ends: ids that end a text for its teacher; none if that is not known.

    """
    found = [*_temperatures(config)]
    for source, dataset in data.read:
        if dataset is not None:
            found += _tokens(source, dataset, tokenizer, teacher_ends)
            found += _lengths(dataset, config.batch.max_tokens)
    return [*found, *_held_out(config, data)]


def of_model(config: StudentConfig, trained_numbers: int) -> Finding:
    """What a model that was loaded has shown: it is refused where its own code or its loss says otherwise."""
    what = "adapters" if config.lora else "weights"
    text = f"logits and loss as its own code has them; {trained_numbers:,} numbers of {what} are trained, and "
    return Finding("model", "ok", text + "the loss reaches all of them")


def of_teacher(config: StudentConfig, identity: TeacherIdentity | None) -> Finding:
    """What a teacher that was reached has shown: one that is another, or unlike its other servers, is refused."""
    if identity is None:
        return Finding("teacher", "ok", f"{config.objective.label} asks none")
    text = f"{identity.model_name}: tokenizer, chat template and servers agree; alone and among others, it was "
    return Finding("teacher", "ok", text + f"{identity.noise_floor_kl:.2g} nats a token from itself when it started")


def write(findings: Sequence[Finding], folder: Path) -> None:
    """Keeps them in a student's folder, for the report."""
    content = [{key: value for key, value in asdict(each).items() if key != "exit_code"} for each in findings]
    write_durably(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _temperatures(config: StudentConfig) -> list[Finding]:
    sampling, objective = config.sampling, config.objective
    if objective.on_policy_fraction == 0:
        return [Finding("sampling", "ok", f"none: {objective.label} learns from the data's sequences")]
    strange = [
        f"sampling.{name} {getattr(sampling, name)} cuts or bends what the student writes"
        for name in ("top_p", "repetition_penalty")
        if getattr(sampling, name) != 1.0
    ]
    known = {1.0, objective.temperature_of_student}
    if sampling.temperature not in known:
        strange.append(
            f"sampling.temperature {sampling.temperature} is neither 1 nor the objective's "
            f"{objective.temperature_of_student}"
        )
    text = f"at temperature {sampling.temperature:g}, compared at {objective.temperature_of_student:g}"
    if strange:
        return [Finding("sampling", "note", f"{'; '.join(strange)}: what is learned from is not its own distribution")]
    return [Finding("sampling", "ok", text)]


def _tokens(source: SourceConfig, dataset: Dataset, tokenizer: Any, teacher_ends: Sequence[int]) -> list[Finding]:
    """Whether texts begin and end once, and as the model's own do."""
    rows, begin = dataset.examples, tokenizer.bos_token_id
    found = []
    begins = begin is not None and list(beginning_ids(tokenizer, "a"))[:1] == [begin]
    doubled = _count(rows, lambda row: begin is not None and row.prompt_ids[:2].tolist() == [begin, begin])
    lost = _count(rows, lambda row: begins and row.prompt_ids[:1].tolist() != [begin])
    if doubled:
        text = f"{doubled:,} of {len(rows):,} rows begin with two begin tokens ({tokenizer.bos_token!r}): the template "
        text += "writes one, and the rows or the tokenizer another; take one of them away"
        found.append(Finding("begin token", "bad", text, EXIT_DATA))
    elif lost:
        text = f"{lost:,} of {len(rows):,} rows lack the begin token {tokenizer.bos_token!r} that the tokenizer gives "
        text += f"every text: the template {source.template} writes none"
        found.append(Finding("begin token", "note", text))
    else:
        found.append(Finding("begin token", "ok", "as the tokenizer has it"))
    end = completion_end_id(source.template, tokenizer, source.chat)
    answered = [row for row in rows if len(row.completion_ids)]
    twice = _count(answered, lambda row: row.completion_ids[-2:].tolist() == [end, end])
    without = _count(answered, lambda row: end not in row.completion_ids[-_LAST:].tolist())
    name = tokenizer.convert_ids_to_tokens(end)
    if twice:
        text = f"{twice:,} of {len(answered):,} completions end with two end tokens ({name!r}); take it out of the rows"
        found.append(Finding("end token", "bad", text, EXIT_DATA))
    elif answered and without == len(answered):
        text = f"no completion has its end token {name!r}, so the student never sees where an answer ends: "
        cut = dataset.truncated_completions
        text += f"{cut:,} of them are cut at batch.max_tokens; raise it" if cut else "the template writes none; mend it"
        found.append(Finding("end token", "bad", text, EXIT_DATA))
    elif teacher_ends and end not in teacher_ends:
        text = f"completions end with {name!r}, with which the teacher ends none ({sorted(teacher_ends)})"
        found.append(Finding("end token", "note", text))
    else:
        found.append(Finding("end token", "ok", f"{name!r}"))
    return found


def _lengths(dataset: Dataset, max_tokens: int) -> list[Finding]:
    """What the length of a batch costs."""
    rows = len(dataset.examples) + dataset.dropped_prompts
    much = max(dataset.dropped_prompts, dataset.truncated_completions) > _MUCH * rows
    lines = dataset.cost_of_length(max_tokens)
    text = "; ".join(lines) or f"all {rows:,} rows fit into {max_tokens:,} tokens"
    return [Finding("length", "note" if much else "ok", text)]


def _held_out(config: StudentConfig, data: Data) -> list[Finding]:
    """Whether what is measured on is trained on."""
    if not data.held_out:
        return [Finding("held out", "ok", "nothing is measured on held-out rows")]
    rows = [row for _, dataset in data.read if dataset for row in dataset.examples]
    trained = {row_key(row) for row in rows}
    # A prompt without an answer is answered by whoever trains on it.
    asked = {row.prompt_ids.tobytes() for row in rows if not len(row.completion_ids)}
    shared = _count(data.held_out, lambda row: row_key(row) in trained or row.prompt_ids.tobytes() in asked)
    if shared == len(data.held_out):
        text = f"all {shared:,} held-out rows are training rows, so what is measured on them is memory; hold out others"
        return [Finding("held out", "bad", text, EXIT_USAGE)]
    if shared:
        text = f"{shared:,} of {len(data.held_out):,} held-out rows are training rows as well; take them out of one"
        return [Finding("held out", "note", text)]
    if config.held_out.data and any(dataset is None for _, dataset in data.read):
        text = f"{len(data.held_out):,} rows; whether what streams has them as well is not looked for"
        return [Finding("held out", "note", text)]
    return [Finding("held out", "ok", f"{len(data.held_out):,} rows, none of them trained on")]


def _count(rows: Sequence[TokenizedExample], holds: Callable[[TokenizedExample], bool]) -> int:
    return sum(map(holds, rows))
