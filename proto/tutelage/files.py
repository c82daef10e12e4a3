"""Files and folders that are there whole or not at all, whatever ends their writer: one way for all services.

A new content is written beside its place, forced to disk and renamed, and then the folder that holds the name is
forced to disk too. A reader sees the old content or the new one; a kill, or the power, costs at most the new one.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tutelage.errors import CheckpointError, ConfigurationError

# None is of a library that says in words what the file system said.
_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
PARTIAL_SUFFIX = ".partial"
"""Of what a kill may leave beside a file; no reader's pattern (`*.json`, `*.parquet`, `*.safetensors`) ends so."""


@contextmanager
def reporting_disk_errors(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns what a file system refuses while `path` is written into an error that says what to do.

    Args:
        path: what is being written.
        kinds: exceptions that a library wraps such a refusal in, besides OSError.

    Raises:
        CheckpointError: with the file system's reason.

    """
    refusals: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except CheckpointError:
        raise
    except refusals as error:
        # Not the name of what was being written beside its place, which is gone.
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        remedy = "make room" if getattr(error, "errno", None) in _ROOM else "mend that"
        raise CheckpointError(
            f"cannot write {path}: {reason}; earlier checkpoints and files are untouched, {remedy} and start again"
        ) from error


def require_writable(folder: Path, field: str) -> None:
    """Looks whether a folder can be made or written to.

    Args:
        folder: it may be there already.
        field: the setting that names it.

    Raises:
        ConfigurationError: a file stands in its place or above it, or this user may not write there.

    """
    there = folder.absolute()
    while not os.path.exists(there):  # which is also false below a folder that this user may not enter
        there = there.parent
    if not there.is_dir():
        raise ConfigurationError(f"{folder} cannot be a folder: {there} is a file; name another one", field)
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{folder} cannot be written to: this user may not change {there}; name another", field
        )


@contextmanager
def requiring_locks(folder: Path, field: str = "") -> Iterator[None]:
    """Says what is wrong where a lock in `folder` is asked for and its file system (flock(2)) has none.

    Args:
        folder: what the lock keeps to one process.
        field: the setting that names it.

    Raises:
        ConfigurationError: the file system has no locks.

    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise ConfigurationError(
            f"the file system of {folder} has no locks ({error.strerror}), so two processes could write it at once; "
            "choose a folder on another one, or have it mounted with locks",
            field,
        ) from error


def write_durably(path: Path, content: bytes | str) -> None:
    """Replaces a file at once, or makes it, so that it outlives a power failure; text is written as UTF-8.

    Raises:
        CheckpointError: the file system refused, for want of room perhaps; what was there is untouched.

    """
    _replace(path, content, durable=True)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces a file at once as `write_durably` does, but leaves it to the system when it reaches the disk.

    For what means nothing after a power failure: addresses, commands, where a run is. Forcing such a file to disk
    twice a second would make its writer wait behind whatever else the disk is given, a checkpoint for example.

    Raises:
        CheckpointError: the file system refused.

    """
    _replace(path, content, durable=False)


def _replace(path: Path, content: bytes | str, *, durable: bool) -> None:
    # Named for the writer: threads of the signal store, or two commands, may write one file at the same time.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{PARTIAL_SUFFIX}")
    with reporting_disk_errors(path):
        try:
            with partial.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                if durable:
                    stream.flush()
                    os.fsync(stream.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)  # It would take the room that is wanting.
            raise
        if durable:
            fsync_directory(path.parent)


def make_directory_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Calls `make` with a new folder beside `folder` and renames that into place, unless `folder` is there.

    Args:
        folder: what is wanted.
        make: puts the files into the folder that it is given; what it raises leaves nothing behind.

    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=PARTIAL_SUFFIX, dir=folder.parent))
    try:
        make(temporary)
        temporary.chmod(0o755)  # mkdtemp lets nobody else in
        fsync_tree(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(temporary)  # Somebody else was faster.
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(folder.parent)
    return folder


def fsync_tree(folder: Path) -> None:
    """Forces every file in a folder and below it to disk, and the names of all of them."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
        else:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    fsync_directory(folder)


def fsync_directory(folder: Path) -> None:
    """Forces the names in a folder to disk; without it a power failure may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
