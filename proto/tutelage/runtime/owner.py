"""A folder that one process at a time works in, which another may find and ask to end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tutelage.errors import Conflict
from tutelage.files import requiring_locks, write_durably


@contextlib.contextmanager
def owning(folder: Path, name: str, *, what: str, field: str = "output") -> Iterator[None]:
    """Makes this process the only one of its kind in a folder; `<name>.json` names it meanwhile.

    Args:
        folder: it is there.
        name: of the kind.
        what: what such a process does there and how it is watched and ended, for people.
        field: the setting that names the folder.

    Raises:
        Conflict: another process is at it.
        ConfigurationError: the folder's file system has no locks.

    """
    descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            # The kernel lets go of it with the process, however that ends; a number in a file would outlive a kill.
            with requiring_locks(folder, field):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"process {owner(folder, name)} {what}") from error
        write_durably(folder / f"{name}.json", json.dumps({"process_id": os.getpid()}))
        yield
    finally:
        os.close(descriptor)


def owner(folder: Path, name: str) -> int | None:
    """The process that has the folder now, if one has."""
    path, lock = folder / f"{name}.json", folder / f"{name}.lock"
    if not lock.exists() or not path.exists():
        return None
    with lock.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(json.loads(path.read_text())["process_id"])
    return None


def end_owner(folder: Path, name: str, *, seconds: float) -> int | None:
    """Sends SIGTERM to the process that has the folder and waits until it has gone; gives its number.

    Args:
        folder: the folder.
        name: of the kind.
        seconds: how long to wait at most.

    """
    process = owner(folder, name)
    if process is None:
        return None
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while owner(folder, name) is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    return process
