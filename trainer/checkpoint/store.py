"""Checkpoints that are there completely or not at all.

`<folder>/step-00000020/` holds a Hugging Face checkpoint, the trainer's state, and `MANIFEST.json` with
every file's size and SHA-256. All files are on disk before the manifest is renamed into place, so a
directory without a valid manifest is not a checkpoint, whatever killed its writer. `<folder>/best` is a
link to the best of them, if the training asks for one. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from tutelage.errors import CheckpointError

_MANIFEST = "MANIFEST.json"
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
            with reporting_disk_errors(folder):
                _remove(folder)
                folder.mkdir(parents=True)
                write(folder)
                commit(folder)
        except CheckpointError:
            shutil.rmtree(folder, ignore_errors=True)  # Half a checkpoint is of no use, and takes room.
            raise
        if best:
            self.link_best(best)
        self._prune({step, best, *protected})
        return Checkpoint(folder, step)

    def link_best(self, step: int) -> None:
        """Lets `best` point to that step's checkpoint; whoever reads it sees the old link or the new one."""
        partial = self._folder / "best.partial"
        with reporting_disk_errors(partial):
            partial.unlink(missing_ok=True)
            partial.symlink_to(self.path(step).name)
            partial.replace(self._folder / "best")

    def path(self, step: int) -> Path:
        """Where the checkpoint of that step is, or would be."""
        return self._folder / f"step-{step:08d}"

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; damaged ones are skipped with a warning, other things ignored."""
        for step, folder in self._candidates():
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
        complete = [(step, path) for step, path in self._candidates() if (path / _MANIFEST).exists()]
        for step, path in complete[self._keep :]:
            if step not in protected:
                _remove(path)


@contextmanager
def reporting_disk_errors(path: Path) -> Iterator[None]:
    """Turns what a file system refuses while `path` is written into an error that says what to do.

    Raises:
        CheckpointError: with the file system's reason.

    """
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; earlier checkpoints are untouched, make room and start again"
        ) from error


def commit(folder: Path) -> None:
    """Makes every file in `folder` durable and names it in a manifest that is renamed into place last."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    fsync_directory(folder)
    write_durably(folder / _MANIFEST, json.dumps({"files": files}, indent=1).encode())
    fsync_directory(folder.parent)


def verify(folder: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        CheckpointError: there is none, or a file is missing, of another size, or of another content.

    """
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
                    raise CheckpointError(f"{path} has changed since it was saved")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is incomplete: {error.filename} is missing") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / _MANIFEST} is not a manifest: {error!r}") from error


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file at once: whoever reads it sees the old content or the new.

    Raises:
        CheckpointError: the file system refused.

    """
    partial = path.with_name(path.name + ".partial")
    with reporting_disk_errors(path):
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        fsync_directory(path.parent)


def fsync_directory(folder: Path) -> None:
    """Makes the entries of a directory durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Removes a checkpoint, its manifest first, so that no half of one looks whole."""
    if folder.exists():
        (folder / _MANIFEST).unlink(missing_ok=True)
        fsync_directory(folder)
        shutil.rmtree(folder)
