"""The manifest of a checkpoint: every file's size and SHA-256, renamed into place last.

All files are on disk before the manifest is, so a directory without a valid one is not a checkpoint, whatever killed
its writer. The trainer writes it; the trainer, the evaluator and a study believe it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from tutelage.errors import CheckpointError
from tutelage.files import fsync_directory, fsync_tree, write_durably

MANIFEST = "MANIFEST.json"


def is_committed(folder: Path) -> bool:
    """Whether a folder has a manifest; `verify` says whether it is what that says."""
    return (folder / MANIFEST).exists()


def commit(folder: Path) -> None:
    """Makes every file in `folder` and below it durable and names them in a manifest.

    Raises:
        CheckpointError: the file system refused.

    """
    fsync_tree(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_durably(folder / MANIFEST, json.dumps({"files": files}, indent=1))
    fsync_directory(folder.parent)


def verify(folder: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        CheckpointError: there is none, or files are missing, of another size, or of another content; all are named.

    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        problems = [problem for name, entry in files.items() if (problem := _difference(folder / name, name, entry))]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is incomplete: {error.filename} is missing", "checkpoint") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest: {error!r}", "checkpoint") from error
    if problems:
        raise CheckpointError(
            f"{folder} is not what its manifest says: {'; '.join(problems)}. Use another checkpoint", "checkpoint"
        )


def remove(folder: Path) -> None:
    """Removes a checkpoint, its manifest first, so that no half of one looks whole."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        fsync_directory(folder)
        shutil.rmtree(folder)


def _difference(path: Path, name: str, entry: dict[str, int | str]) -> str:
    """What is wrong with a file; empty if it is as its entry says."""
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    return "" if _sha256(path) == entry["sha256"] else f"{name} has other content"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
