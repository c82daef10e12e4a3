"""Checkpoints that are there completely or not at all.

`<folder>/step-00000020/` holds a Hugging Face checkpoint, the trainer's state, and a manifest (`tutelage.manifest`),
without which it is no checkpoint. `<folder>/best` is a link to the best of them, if the training asks for one.
Nothing here is pickled.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from tutelage.errors import CheckpointError
from tutelage.files import reporting_disk_errors
from tutelage.manifest import commit, is_committed, remove, verify

_NAME = re.compile(r"step-(\d{8})\Z")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int


class CheckpointStore:
    """The checkpoints of one student, written by one process.

    Args:
        folder: where they lie; made on the first save.
        keep: how many of the newest stay.

    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def save(
        self, step: int, write: Callable[[Path], None], *, protected: Collection[int] = (), best: int = 0
    ) -> Checkpoint:
        """Writes a checkpoint and then removes old ones.

        Args:
            step: optimizer steps done.
            write: puts the files into the directory that it is given.
            protected: steps whose checkpoints stay, however old.
            best: step of the best checkpoint, which stays too; 0 means none.

        Raises:
            CheckpointError: the file system refused, for want of room perhaps; earlier checkpoints are untouched.

        """
        folder = self.path(step)
        try:
            with reporting_disk_errors(folder, SafetensorError):
                remove(folder)  # What a kill left of this very step.
                folder.mkdir(parents=True)
                write(folder)
                commit(folder)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)  # Half a checkpoint is of no use, and takes room.
            raise
        # In this order: a kill in between leaves a checkpoint too many, and never a link to one that is gone.
        if best:
            self.link_best(best)
        self._prune({step, best, *protected})
        return Checkpoint(folder, step)

    def link_best(self, step: int) -> None:
        """Lets `best` point to that step's checkpoint; whoever reads it sees the old link or the new one."""
        partial = self._folder / "best.partial"
        with reporting_disk_errors(partial):
            partial.unlink(missing_ok=True)
            partial.symlink_to(self.path(step).name)  # Relative: the folder may be moved, or mounted elsewhere.
            partial.replace(self._folder / "best")

    def path(self, step: int) -> Path:
        """Where the checkpoint of that step is, or would be."""
        return self._folder / f"step-{step:08d}"

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged ones are skipped with a warning, other things ignored."""
        for step, folder in self._candidates():
            # Every byte is read, 0.8 processor seconds for 57M parameters (docs/ray.md): a disk may have changed one.
            try:
                verify(folder)
            except CheckpointError as error:
                _log.warning("skipping a checkpoint: %s", error)
            else:
                return Checkpoint(folder, step)
        return None

    def _candidates(self) -> list[tuple[int, Path]]:
        """Directories that look like checkpoints, newest first."""
        if not self._folder.is_dir():
            return []
        entries = [(_NAME.match(path.name), path) for path in self._folder.iterdir()]
        found = [(int(match[1]), path) for match, path in entries if match and path.is_dir() and not path.is_symlink()]
        return sorted(found, reverse=True)

    def _prune(self, protected: Collection[int]) -> None:
        # What a kill left without a manifest does not count among those that are kept; a save of its step removes it.
        complete = [(step, path) for step, path in self._candidates() if is_committed(path)]
        for step, path in complete[self._keep :]:
            if step not in protected:
                remove(path)
