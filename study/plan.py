"""What a study will cost: cells, what they share, tokens, bytes and hours.

Sequences that the data set gives are scored once for all cells; what students write themselves is scored once for each
cell. Hours come from this study's own finished cells where there are some, else from the rates that the file declares.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from tutelage.data.dataset_files import read_conversations
from tutelage.data.hub import local_file
from tutelage.errors import DataError
from tutelage.study.cells import Cell
from tutelage.study.folder import Folder
from tutelage.study.resolution import Study

_CHARACTERS_A_TOKEN = 4.0  # of English under the usual vocabularies; only a plan is made of it
_BFLOAT16_BYTES = 2  # hidden states travel so


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
    data_is_here: bool
    """Whether the students' data could be read, so that what teachers do with it is counted."""


def cost_of(study: Study, folder: Folder) -> Cost:
    """The cost of a study.

    Raises:
        DataError: a data file is here and is not as the trainer takes it.

    """
    missing = [cell for cell in study.cells if not folder.is_done(cell, study.evaluation_id(cell))]
    tokens = _Tokens(study)
    hours, source = _hours(study, folder, [cell for cell in missing if cell.settings], tokens)
    return Cost(
        done=len(study.cells) - len(missing),
        missing=len(missing),
        trained_tokens=sum(tokens.trained(cell) for cell in missing),
        teachers=tuple(_teacher_cost(study, name, tokens) for name in study.config.teachers),
        hours=hours,
        source=source,
        data_is_here=tokens.data_rows > 0,
    )


class _Tokens:
    """How many tokens the cells of a study read and generate; a token counts as four characters."""

    def __init__(self, study: Study) -> None:
        paths = [study.config.data, *(path for cell in study.cells if cell.settings for path in cell.data_paths)]
        rows = {path: _read(path) for path in dict.fromkeys(paths)}
        self.data_rows = len(rows[study.config.data])
        """Rows of the students' data; 0 while it is not here."""
        self._mean_of_file = {
            # Of a file that is not here the limit of the batch decides.
            path: sum(map(len, texts)) / len(texts) / _CHARACTERS_A_TOKEN if texts else math.inf
            for path, texts in rows.items()
        }

    def length(self, cell: Cell) -> float:
        """Mean tokens of a row of the cell's data, as the trainer cuts it."""
        longest = float(cell.settings["batch"]["max_tokens"])
        means = [self._mean_of_file[path] for path in cell.data_paths]
        return min(sum(means) / len(means), longest)

    def sampled_length(self, cell: Cell) -> float:
        """Tokens of a sequence that the student generates, at most."""
        longest = float(cell.settings["batch"]["max_tokens"])
        return min(longest, self.length(cell) + float(cell.settings["sampling"]["max_new_tokens"]))

    def trained(self, cell: Cell) -> int:
        """Tokens that a training sees; 0 if there is none."""
        return round(_sequences(cell) * self.length(cell)) if cell.settings else 0


def _read(path: Path) -> list[str]:
    """The texts of each row of a data file, joined; none if the file is not here or the hub does not give it."""
    try:
        if not local_file(path).is_file():
            return []
    except DataError:
        return []
    return ["".join(str(value) for value in row.values()) for row, _ in read_conversations(path)]


def _teacher_cost(study: Study, name: str, tokens: _Tokens) -> TeacherCost:
    cells = [cell for cell in study.students_of(name) if cell.asks_teacher]
    fixed, own = [], 0
    for cell in cells:
        sequences, fraction = _sequences(cell), _own_fraction(cell)
        own += round(sequences * fraction * tokens.sampled_length(cell))
        # The data's own sequences; no cell can have more of them scored anew than there are.
        fixed.append((cell.seed, round(min(sequences * (1 - fraction), tokens.data_rows) * tokens.length(cell))))
    # Different seeds see different parts of the data, at most all of it.
    by_seed = {seed: max(count for of, count in fixed if of == seed) for seed, _ in fixed}
    whole = round(tokens.data_rows * max((tokens.length(cell) for cell in cells), default=0.0))
    shared = min(whole, sum(by_seed.values()))
    files = {study.rationales_file(cell) for cell in study.students_of(name) if cell.rationales}
    models = [study.config.teachers[member].model for member in study.members(name)]
    width = max(study.config.models[model].hidden_size for model in models)
    unshared = sum(count for _, count in fixed)
    return TeacherCost(
        teacher=name,
        cells=len(cells),
        shared_tokens=shared,
        unshared_tokens=unshared,
        sampled_tokens=own,
        written_tokens=len(files) * tokens.data_rows * study.config.rationales.max_new_tokens,
        hidden_bytes=(unshared + own) * width * _BFLOAT16_BYTES,
    )


def _hours(study: Study, folder: Folder, missing: list[Cell], tokens: _Tokens) -> tuple[float | None, str]:
    """Hours of the missing cells, each from finished ones that are most like it, else from the declared rates."""
    measured, rates = _Measured(study, measured_seconds(study, folder)), study.config.rates
    total = 0.0
    for cell in missing:
        seconds = measured.like(cell)
        if seconds is None and rates is None:
            return None, f"nothing like {cell.id} has run, and the file declares no rates"
        if seconds is None and rates:
            size = study.config.models[cell.model].parameters / rates.at_parameters
            own = _sequences(cell) * _own_fraction(cell) * tokens.sampled_length(cell)
            seconds = tokens.trained(cell) * size / rates.train_tokens_per_second + rates.seconds_per_cell
            seconds += own / rates.write_tokens_per_second + own / rates.score_tokens_per_second
        total += seconds or 0.0
    sources = [f"measured on {len(measured.seconds)} cells of this study"] if measured.seconds else []
    sources += [f"declared, {rates.source}"] if rates and any(measured.like(cell) is None for cell in missing) else []
    # As if cells at once did not slow each other down: those measured ran beside others already.
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


def measured_seconds(study: Study, folder: Folder) -> dict[str, float]:
    """Wall-clock seconds of each trained cell, from its own first to its last step."""
    seconds = {}
    for cell in study.cells:
        path = folder.path("students", cell.id, "metrics.jsonl")
        if cell.settings and path.exists() and folder.is_trained(cell):
            times = [json.loads(line)["time_seconds"] for line in path.read_text(encoding="utf-8").splitlines()]
            # A training that was killed and went on counts the time between, too; a plan is rough.
            seconds[cell.id] = times[-1] - times[0]
    return seconds


def _sequences(cell: Cell) -> int:
    """Sequences that a training sees."""
    return cell.steps * int(cell.settings["batch"]["sequences"])


def _own_fraction(cell: Cell) -> float:
    """Share of them that the student writes."""
    return float(cell.settings["objective"]["on_policy_fraction"])
