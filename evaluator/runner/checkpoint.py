"""A checkpoint is used only if it is what its manifest says, and stays there while it is used."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from tutelage.errors import CheckpointError, DataError
from tutelage.files import make_directory_once
from tutelage.identity import weights_digest
from tutelage.manifest import is_committed, verify


def verified_digest(checkpoint: Path) -> str:
    """SHA-256 of the weights, after every file that the manifest names has proved to be as it says.

    A directory without a manifest (a model from elsewhere) is taken as it is.

    Raises:
        CheckpointError: no weights, or a file that is missing or differs from the manifest.

    """
    if is_committed(checkpoint):
        verify(checkpoint)
    try:
        return weights_digest(checkpoint)
    except (DataError, FileNotFoundError) as error:
        raise CheckpointError(f"{checkpoint} is not a Hugging Face checkpoint: {error}", "checkpoint") from error


def pin(checkpoint: Path, place: Path) -> Path:
    """The checkpoint under a name of our own, which its trainer does not remove; hard links, so it costs no room.

    A directory without a manifest (a model from elsewhere) is not a trainer's to remove and is used where it is.
    On another file system the files are copied. Doing it again changes nothing.
    """
    if not place.is_dir() and not is_committed(checkpoint):
        return checkpoint
    try:
        return make_directory_once(
            place, lambda folder: shutil.copytree(checkpoint, folder, copy_function=_link, dirs_exist_ok=True)
        )
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"{checkpoint} went away while it was pinned: {error}", "checkpoint") from error


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        # Links do not cross file systems; a full disk or a lost file is another matter.
        if error.errno != errno.EXDEV:
            raise
        shutil.copy2(source, target)
