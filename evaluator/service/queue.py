"""The durable queue: one SQLite file, every change of state a transaction, so that a kill loses nothing.

Evaluations run in the order of their submission. One that was running when the process ended is queued again
when the queue is opened; what it had finished lies beside its frames and is not done twice.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tutelage.errors import Conflict, DataError, NotFound
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest

State = Literal["queued", "running", "done", "failed", "cancelled"]
FILE = "queue.sqlite3"
IMPORTED = "imported"
"""Folder below the queue's for the JSON files, one an evaluation, that queues were before."""


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
        """Whether nothing more will happen to it, unless it is submitted again."""
        return self.state in ("done", "failed", "cancelled")

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Entry:
        """The entry that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: the text is no entry.

        """
        content = json.loads(text)
        evaluation = {**content["evaluation"]}
        evaluation["checkpoint"] = Path(evaluation["checkpoint"])
        evaluation["labels"] = Labels(**evaluation["labels"])
        evaluation["tasks"] = tuple(TaskRequest(**task) for task in evaluation["tasks"])
        scores = tuple(Score(**score) for score in content["scores"])
        return cls(**{**content, "evaluation": Evaluation(**evaluation), "scores": scores})


class Queue:
    """All evaluations ever submitted to a folder. Safe to use from several threads of one process.

    Another process that opens the same folder is refused. Reads are answered from memory.
    """

    def __init__(self, folder: Path) -> None:
        """Reads what is there.

        Raises:
            Conflict: another process has the queue.
            DataError: the file, or one of a queue of JSON files, is not a queue's.

        """
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._file = folder / FILE
        # The threads take turns by our lock, which SQLite's own check of threads does not know of.
        self._database = sqlite3.connect(self._file, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            # Held until the process ends, however it ends: two services would do the same evaluation twice.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            # Not WAL, which needs shared memory and so does not work on network file systems. EXTRA also syncs the
            # folder after the journal is gone: without it a power cut may bring a committed change back.
            self._database.execute("PRAGMA journal_mode = DELETE")
            self._database.execute("PRAGMA synchronous = EXTRA")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS evaluations (evaluation_id TEXT PRIMARY KEY, entry TEXT NOT NULL)"
            )
            self._database.execute("BEGIN IMMEDIATE")  # takes the lock now, and not with the first submission
            self._database.execute("COMMIT")
            texts = [text for (text,) in self._database.execute("SELECT entry FROM evaluations")]
        except sqlite3.OperationalError as error:
            self._database.close()
            raise Conflict(
                f"{self._file} cannot be used ({error}); if another evaluator serves it, stop that one or name another "
                "folder",
                "queue",
            ) from error
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise DataError(f"{self._file} is not a queue ({error}); move it away", "queue") from error
        entries = [_read(text, self._file) for text in texts]
        self._entries = {entry.evaluation.evaluation_id: entry for entry in entries}
        self._import_json_files(folder)
        for entry in list(self._entries.values()):
            if entry.state == "running":
                self._store(replace(entry, state="queued"))

    def _import_json_files(self, folder: Path) -> None:
        """Takes over a queue of JSON files, once; a kill in between is no harm."""
        for path in sorted(folder.glob("*.json")):
            entry = _read(path.read_text(encoding="utf-8"), path)
            if entry.evaluation.evaluation_id not in self._entries:
                self._store(entry)
            (folder / IMPORTED).mkdir(exist_ok=True)
            path.rename(folder / IMPORTED / path.name)

    def close(self) -> None:
        """Lets go of the file; nothing can be changed afterwards."""
        with self._lock:
            self._database.close()

    def submit(self, evaluation: Evaluation) -> Entry:
        """Queues an evaluation; the same one again is the same entry, queued again if it failed.

        Raises:
            Conflict: the id stands for another evaluation.

        """
        with self._lock:
            known = self._entries.get(evaluation.evaluation_id)
            if known is not None and known.evaluation != evaluation:
                raise Conflict(
                    f"{evaluation.evaluation_id} is already another evaluation; choose another id", "evaluation_id"
                )
            # What failed may have failed of something that is over, such as a full disk.
            if known is None or known.state == "failed":
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
        name = entry.evaluation.evaluation_id
        self._database.execute("INSERT OR REPLACE INTO evaluations VALUES (?, ?)", (name, entry.to_json()))
        self._entries[name] = entry
        return entry


def _read(text: str, path: Path) -> Entry:
    try:
        return Entry.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds what is not an evaluation ({error!r}); move it away", "queue") from error
