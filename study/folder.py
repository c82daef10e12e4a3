"""What a study keeps on disk, and what of it is done.

cells/<id>.json                 a finished cell: trained, scored, its frames in place; renamed into place whole
students/<id>/checkpoints/…     what the trainer writes
preflight.json                  what it found of the tasks' items among the rows, by cell
frames/, queue/                 what the evaluator writes
rationales/, cohorts/, usage/, logs/
study.json                      every cell with what it is, for the report
plan.json                       the study as the last run resolved it, for a file that is broken or gone since
driver.json, driver.lock        who runs it
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tutelage.errors import CheckpointError
from tutelage.files import write_durably
from tutelage.manifest import is_committed
from tutelage.runtime.owner import owner, owning
from tutelage.study.cells import Cell
from tutelage.study.config import EndsBy

_PARTS = ("cells", "cohorts", "frames", "logs", "queue", "rationales", "students", "usage")


class Folder:
    """The folder of one study.

    Args:
        root: where it is; made if it is missing.

    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def path(self, *parts: str) -> Path:
        """A place below the folder."""
        return self.root.joinpath(*parts)

    def make(self) -> None:
        """Makes what is missing.

        Raises:
            CheckpointError: the file system refused.

        """
        try:
            for part in _PARTS:
                (self.root / part).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot write below {self.root}: {error}; choose another folder", "output"
            ) from error

    def checkpoint(self, cell: Cell) -> Path:
        """What a cell trained: its best checkpoint if it keeps one, else its last; of a model as it is, the model."""
        if not cell.settings:
            return Path(cell.start)
        name = "best" if cell.settings.get("best") else f"step-{self.last_step(cell):08d}"
        return self.root / "students" / cell.id / "checkpoints" / name

    def last_step(self, cell: Cell) -> int:
        """Optimizer steps of its training, which a trainer that ends by tokens leaves behind; 0 while that is on."""
        if cell.ends_by == "steps":
            return cell.steps
        outcome = self.root / "students" / cell.id / "outcome.json"
        return int(json.loads(outcome.read_text(encoding="utf-8"))["step"]) if outcome.exists() else 0

    def is_trained(self, cell: Cell) -> bool:
        """Whether its last checkpoint is complete."""
        if not cell.settings:
            return True
        step = self.last_step(cell)
        return step > 0 and is_committed(self.root / "students" / cell.id / "checkpoints" / f"step-{step:08d}")

    def noted(self, cells: Iterable[Cell]) -> list[str]:
        """What the trainer noted of the tasks that cells are scored on, such as items among their rows; alike once."""
        path = self.root / "preflight.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        of_cells = [finding for cell in cells for finding in found.get(cell.id, ()) if finding["state"] == "note"]
        return list(dict.fromkeys(f"{finding['topic']}: {finding['text']}" for finding in of_cells))

    def spent(self, cell: Cell, unit: EndsBy) -> int:
        """Tokens of a kind that a cell's training spent so far."""
        column = {"scored_tokens": "train/tokens", "teacher_tokens": "train/teacher_tokens"}[unit]
        path = self.root / "students" / cell.id / "metrics.jsonl"
        return sum(int(json.loads(line).get(column, 0)) for line in path.read_text(encoding="utf-8").splitlines())

    def marker(self, cell: Cell) -> dict[str, Any] | None:
        """What was noted when the cell was finished; None if it is not."""
        path = self.root / "cells" / f"{cell.id}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def is_done(self, cell: Cell, evaluation_id: str) -> bool:
        """Whether it is trained and its present evaluation is in the frames."""
        marker = self.marker(cell)
        return marker is not None and marker["evaluation_id"] == evaluation_id

    def finish(self, cell: Cell, note: dict[str, Any]) -> None:
        """Marks a cell as finished, durably; its frames must be in place."""
        write_durably(self.root / "cells" / f"{cell.id}.json", json.dumps(note, indent=1) + "\n")

    @contextlib.contextmanager
    def driven(self) -> Iterator[None]:
        """Makes this process the only driver; `driver.json` names it meanwhile.

        Raises:
            Conflict: another process drives this study.
            ConfigurationError: the folder's file system has no locks.

        """
        what = f"runs the study in {self.root}; watch it with `status`, end it with `stop`"
        with owning(self.root, "driver", what=what):
            yield

    def driver(self) -> int | None:
        """The process that drives the study now, if one does."""
        return owner(self.root, "driver")
