"""A checkpoint is used only if it is what its manifest says, and stays there while it is used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

from tutelage.errors import CheckpointError, DataError
from tutelage.identity import weights_digest

MANIFEST = "MANIFEST.json"


def verified_digest(checkpoint: Path) -> str:
    """SHA-256 of the weights, after every file that the manifest names has proved to be as it says.

    A directory without a manifest (a model from elsewhere) is taken as it is.

    Raises:
        CheckpointError: no weights, or a file that is missing or differs from the manifest.

    """
    if (checkpoint / MANIFEST).exists():
        _verify(checkpoint)
    try:
        return weights_digest(checkpoint)
    except (DataError, FileNotFoundError) as error:
        raise CheckpointError(f"{checkpoint} is not a Hugging Face checkpoint: {error}", "checkpoint") from error


def pin(checkpoint: Path, place: Path) -> Path:
    """The checkpoint under a name of our own, which its trainer does not remove; hard links, so it costs no room.

    A directory without a manifest (a model from elsewhere) is not a trainer's to remove and is used where it is.
    On another file system the files are copied. Doing it again changes nothing.
    """
    if place.is_dir():
        return place
    if not (checkpoint / MANIFEST).exists():
        return checkpoint
    temporary = place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in checkpoint.iterdir():
            _link(path, temporary / path.name)
        os.replace(temporary, place)
    except OSError as error:
        shutil.rmtree(temporary)
        if place.is_dir():  # another thread was faster
            return place
        raise CheckpointError(f"{checkpoint} went away while it was pinned: {error}", "checkpoint") from error
    return place


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source, target)


def _verify(checkpoint: Path) -> None:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        problems = [problem for name, entry in files.items() if (problem := _difference(checkpoint / name, entry))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is not a manifest ({error!r})", "checkpoint") from error
    if problems:
        raise CheckpointError(
            f"{checkpoint} is not what its manifest says: {'; '.join(problems)}. Evaluate another checkpoint",
            "checkpoint",
        )


def _difference(path: Path, entry: dict[str, str | int]) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return "" if digest == entry["sha256"] else f"{path.name} has other content"
