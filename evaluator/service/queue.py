"""The durable queue: one JSON file an evaluation, renamed into place whole, so that a kill loses nothing.

Evaluations run in the order of their submission. One that was running when the process ended is queued again
when the queue is opened; what it had finished lies beside its frames and is not done twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tutelage.errors import Conflict, DataError, NotFound
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.files import write_durably

State = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Score:
    """Mean score of one task; see the contract's `TaskScore`."""

    task: str
    protocol: str
    metric: str
    score: float
    standard_error: float
    items: int


@dataclass(frozen=True)
class Entry:
    """One evaluation and how far it is; `number` is its place in the order of submission."""

    number: int
    evaluation: Evaluation
    state: State = "queued"
    items_done: int = 0
    items_total: int = 0
    items_failed: int = 0
    items_per_second: float = 0.0
    seconds_left: float = -1.0
    scores: tuple[Score, ...] = ()
    error: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")


class Queue:
    """All evaluations ever submitted to a folder. Safe to use from several threads of one process."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there.

        Raises:
            DataError: a file is not an entry.

        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._entries = {entry.evaluation.evaluation_id: entry for entry in _read_all(folder)}
        for entry in list(self._entries.values()):
            if entry.state == "running":
                self._store(replace(entry, state="queued"))

    def submit(self, evaluation: Evaluation) -> Entry:
        """Queues an evaluation; the same one again is the same entry.

        Raises:
            Conflict: the id stands for another evaluation.

        """
        with self._lock:
            known = self._entries.get(evaluation.evaluation_id)
            if known is not None and known.evaluation != evaluation:
                raise Conflict(
                    f"{evaluation.evaluation_id} is already another evaluation; choose another id", "evaluation_id"
                )
            if known is None:
                number = 1 + max((entry.number for entry in self._entries.values()), default=0)
                known = self._store(Entry(number, evaluation))
                self._arrived.notify_all()
            return known

    def get(self, evaluation_id: str) -> Entry:
        """The entry of an evaluation.

        Raises:
            NotFound: no evaluation has this id.

        """
        with self._lock:
            if evaluation_id not in self._entries:
                raise NotFound(f"no evaluation is called {evaluation_id!r}; submit it first", "evaluation_id")
            return self._entries[evaluation_id]

    def entries(self) -> list[Entry]:
        """All, oldest first."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda entry: entry.number)

    def take(self, timeout_seconds: float) -> Entry | None:
        """The oldest entry that waits, now running, or None when none came in time; no two callers get the same."""
        with self._arrived:
            if not self._waiting():
                self._arrived.wait(timeout_seconds)
            oldest = min(self._waiting(), key=lambda entry: entry.number, default=None)
            return None if oldest is None else self._store(replace(oldest, state="running"))

    def cancel(self, evaluation_id: str) -> Entry:
        """Ends an evaluation that waits or runs; whoever runs it stops after the batch at hand.

        Raises:
            NotFound: no evaluation has this id.

        """
        entry = self.get(evaluation_id)
        return entry if entry.ended else self.change(evaluation_id, state="cancelled", seconds_left=0.0)

    def _waiting(self) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.state == "queued"]

    def change(self, evaluation_id: str, **fields: Any) -> Entry:
        """Sets fields of an entry; a change of state is on disk before this returns, progress is not written.

        An entry that has ended stays as it is.
        """
        with self._lock:
            entry = self._entries[evaluation_id]
            if entry.ended:
                return entry
            entry = replace(entry, **fields)
            if "state" in fields:
                return self._store(entry)
            self._entries[evaluation_id] = entry
            return entry

    def _store(self, entry: Entry) -> Entry:
        path = self._folder / f"{entry.evaluation.evaluation_id}.json"
        write_durably(path, json.dumps(asdict(entry), default=str, indent=1))
        self._entries[entry.evaluation.evaluation_id] = entry
        return entry


def _read_all(folder: Path) -> Iterable[Entry]:
    for path in folder.glob("*.json"):
        try:
            yield _entry_of(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not an evaluation ({error!r}); move it away", "queue") from error


def _entry_of(content: dict[str, Any]) -> Entry:
    evaluation = content["evaluation"]
    return Entry(
        **{
            **content,
            "evaluation": Evaluation(
                evaluation_id=evaluation["evaluation_id"],
                checkpoint=Path(evaluation["checkpoint"]),
                labels=Labels(**evaluation["labels"]),
                tasks=tuple(TaskRequest(**task) for task in evaluation["tasks"]),
                seed=evaluation["seed"],
            ),
            "scores": tuple(Score(**score) for score in content["scores"]),
        }
    )
