"""One writer of a folder: a lock that the kernel releases when its holder dies, however it dies."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tutelage.errors import Conflict
from tutelage.files import reporting_disk_errors, requiring_locks

_POLL_SECONDS = 0.5


@contextmanager
def folder_lock(
    folder: Path,
    *,
    advice: str,
    field: str,
    wait_seconds: float = 0.0,
    waiting: Callable[[str], None] = lambda _holder: None,
) -> Iterator[None]:
    """Holds `folder/lock`, in which the holder writes who it is.

    Args:
        folder: made if it is not there.
        advice: for whoever is refused: what to do.
        field: of the configuration that names the folder.
        wait_seconds: how long to wait for a holder to end.
        waiting: told every half second who that is; what it raises ends the wait.

    Raises:
        Conflict: a living process holds it, and still does after that time.
        CheckpointError: the file system refused.
        ConfigurationError: it has no locks.

    """
    path = folder / "lock"

    def sign(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    # No fallback: where a file system has no flock, filelock would take the file's being there for the lock, which
    # outlives a killed holder and then keeps its successor out.
    lock = FileLock(path, blocking=False, fallback_to_soft=False, preserve_lock_file=True, on_acquired=sign)
    deadline = time.monotonic() + wait_seconds
    with reporting_disk_errors(path), requiring_locks(folder, field):
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire()
            except Timeout as error:
                holder = path.read_text(encoding="utf-8").strip() or "another process"
                if time.monotonic() >= deadline:
                    raise Conflict(f"{folder} is being written by {holder}; {advice}", field) from error
                waiting(holder)
                time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
