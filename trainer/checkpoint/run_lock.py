"""One process a student: a lock that the kernel releases when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tutelage.errors import Conflict
from tutelage.files import reporting_disk_errors


@contextmanager
def student_lock(folder: Path) -> Iterator[None]:
    """Holds `folder/lock`, in which the holder writes who it is.

    Raises:
        Conflict: a living process holds it.
        CheckpointError: the file system refused.

    """
    path = folder / "lock"
    with reporting_disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+", encoding="utf-8")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise Conflict(
                f"{folder} is being written by {stream.read().strip() or 'another process'}; "
                "stop that one, or give this student another id",
                "students.id",
            ) from error
        with reporting_disk_errors(path):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
        yield
