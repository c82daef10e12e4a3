"""What a study will cost: cells, what they share, tokens, bytes and hours.

Sequences that the data set gives are scored once for all cells; what students write themselves is scored once for each
cell. Hours come from this study's own finished cells where there are some, else from the rates that the file declares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.study.cells import Cell
from tutelage.study.config import RateConfig
from tutelage.study.folder import Folder
from tutelage.study.resolution import Study

_CHARACTERS_A_TOKEN = 4.0
_BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class TeacherCost:
    """What one teacher does."""

    teacher: str
    cells: int
    shared_tokens: int
    """Of the data's sequences, scored once for all cells."""
    unshared_tokens: int
    """The same if every cell had them scored for itself."""
    sampled_tokens: int
    """That students write and have scored, at most."""
    written_tokens: int
    """Of rationales, at most."""
    hidden_bytes: int
    """That travel as hidden states of the above, at most."""


@dataclass(frozen=True)
class Cost:
    """What the whole study does, and what of it is missing."""

    done: int
    missing: int
    trained_tokens: int
    """Of the missing cells, at most."""
    teachers: tuple[TeacherCost, ...]
    hours: float | None
    """Of the missing cells; None if nothing was measured and no rate is declared."""
    source: str
    """Where the hours come from."""


def cost_of(study: Study, folder: Folder) -> Cost:
    """The cost of a study."""
    missing = [cell for cell in study.cells if not folder.is_done(cell, study.evaluation_id(cell))]
    tokens = _mean_tokens(study)
    hours, source = _hours(study, folder, [cell for cell in missing if cell.settings], tokens)
    return Cost(
        done=len(study.cells) - len(missing),
        missing=len(missing),
        trained_tokens=sum(_trained_tokens(cell, tokens) for cell in missing),
        teachers=tuple(_teacher_cost(study, name, tokens) for name in study.config.teachers),
        hours=hours,
        source=source,
    )


def _teacher_cost(study: Study, name: str, tokens: dict[str, float]) -> TeacherCost:
    cells = [cell for cell in study.students_of(name) if cell.asks_teacher]
    fixed, own = [], 0
    for cell in cells:
        sequences, fraction = _sequences(cell), _own_fraction(cell)
        own += round(sequences * fraction * _sampled_length(cell, tokens))
        fixed.append((cell.seed, round(min(sequences * (1 - fraction), _rows(study)) * _length(cell, tokens))))
    # Different seeds see different parts of the data, at most all of it.
    by_seed = {seed: max(count for of, count in fixed if of == seed) for seed, _ in fixed}
    whole = round(_rows(study) * max((_length(cell, tokens) for cell in cells), default=0.0))
    shared = min(whole, sum(by_seed.values()))
    writes = any(cell.rationales for cell in study.students_of(name))
    width = study.config.models[study.config.teachers[name].model].hidden_size
    unshared = sum(count for _, count in fixed)
    return TeacherCost(
        teacher=name,
        cells=len(cells),
        shared_tokens=shared,
        unshared_tokens=unshared,
        sampled_tokens=own,
        written_tokens=_rows(study) * study.config.rationales.max_new_tokens if writes else 0,
        hidden_bytes=(unshared + own) * width * _BFLOAT16_BYTES,
    )


def _hours(study: Study, folder: Folder, missing: list[Cell], tokens: dict[str, float]) -> tuple[float | None, str]:
    """Hours of the missing cells, each from finished ones that are most like it, else from the declared rates."""
    measured, rates = _Measured(study, measured_seconds(study, folder)), study.config.rates
    total = 0.0
    for cell in missing:
        seconds = measured.like(cell)
        if seconds is None and rates is None:
            return None, f"nothing like {cell.id} has run, and the file declares no rates"
        total += _declared_seconds(study, cell, rates, tokens) if seconds is None and rates else seconds or 0.0
    sources = [f"measured on {len(measured.seconds)} cells of this study"] if measured.seconds else []
    sources += [f"declared, {rates.source}"] if rates and any(measured.like(cell) is None for cell in missing) else []
    return total / (3600 * study.config.concurrency), "; ".join(sources)


class _Measured:
    """Seconds of the cells that are trained, by what they are."""

    def __init__(self, study: Study, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._by_kind: dict[tuple[str, ...], list[float]] = {}
        for cell in study.cells:
            if cell.id in seconds:
                for kind in _kinds(cell):
                    self._by_kind.setdefault(kind, []).append(seconds[cell.id])

    def like(self, cell: Cell) -> float | None:
        """Mean of the same model and method, else of the same method, else of the same role; None if there is none."""
        for kind in _kinds(cell):
            if kind in self._by_kind:
                return sum(self._by_kind[kind]) / len(self._by_kind[kind])
        return None


def _kinds(cell: Cell) -> tuple[tuple[str, ...], ...]:
    return (cell.role, cell.method, cell.model), (cell.role, cell.method), (cell.role,)


def _declared_seconds(study: Study, cell: Cell, rates: RateConfig, tokens: dict[str, float]) -> float:
    parameters = study.config.models[cell.model].parameters
    training = _trained_tokens(cell, tokens) * parameters / (rates.train_tokens_per_second * rates.at_parameters)
    own = _sequences(cell) * _own_fraction(cell) * _sampled_length(cell, tokens)
    return training + own / rates.write_tokens_per_second + own / rates.score_tokens_per_second + rates.seconds_per_cell


def measured_seconds(study: Study, folder: Folder) -> dict[str, float]:
    """Wall-clock seconds of each trained cell, from its own first to its last step."""
    seconds = {}
    for cell in study.cells:
        path = folder.path("students", cell.id, "metrics.jsonl")
        if cell.settings and path.exists() and folder.is_trained(cell):
            times = [row["time_seconds"] for row in _rows_of(path)]
            seconds[cell.id] = times[-1] - times[0]
    return seconds


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _rows(study: Study) -> int:
    """Rows of the data set; 0 while it is not there."""
    path = study.config.data
    if not path.is_file():
        return 0
    text = path.read_text(encoding="utf-8")
    return len(json.loads(text)) if path.suffix == ".json" else sum(bool(line.strip()) for line in text.splitlines())


def _mean_tokens(study: Study) -> dict[str, float]:
    """Mean tokens of a row of each data file, by its path; estimated from the characters, four a token."""
    paths = {str(cell.settings["data"]["path"]) for cell in study.cells if cell.settings}
    return {path: _mean_characters(Path(path)) / _CHARACTERS_A_TOKEN for path in paths}


def _mean_characters(path: Path) -> float:
    if not path.is_file():
        return math.inf  # the limit of the batch decides
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    return sum(len(str(value)) for row in rows for value in row.values()) / len(rows)


def _length(cell: Cell, tokens: dict[str, float]) -> float:
    return min(tokens[str(cell.settings["data"]["path"])], float(cell.settings["batch"]["max_tokens"]))


def _sampled_length(cell: Cell, tokens: dict[str, float]) -> float:
    longest = float(cell.settings["batch"]["max_tokens"])
    return min(longest, _length(cell, tokens) + float(cell.settings["sampling"]["max_new_tokens"]))


def _trained_tokens(cell: Cell, tokens: dict[str, float]) -> int:
    if not cell.settings:
        return 0
    return round(_sequences(cell) * _length(cell, tokens))


def _sequences(cell: Cell) -> int:
    """Sequences that a training sees."""
    return cell.steps * int(cell.settings["batch"]["sequences"])


def _own_fraction(cell: Cell) -> float:
    """Share of them that the student writes."""
    return float(cell.settings["objective"]["on_policy_fraction"])
