"""A student's log, for people: `student.log` in its folder, and what Ray shows on its actor's page."""

from __future__ import annotations

import logging
from pathlib import Path

from tutelage.files import reporting_disk_errors

LOG_FILE = "student.log"


def write_log(folder: Path) -> None:
    """Lets what this process logs go to the log in a student's folder, after what is there, and to stderr.

    Args:
        folder: the student's; made if it is not there.

    Raises:
        CheckpointError: the file system refused.

    """
    with reporting_disk_errors(folder / LOG_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        # Ray keeps what its process says on stderr, and shows that on the actor's page of the dashboard.
        handlers: list[logging.Handler] = [
            logging.StreamHandler(),
            logging.FileHandler(folder / LOG_FILE, encoding="utf-8"),
        ]
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        handlers=handlers,
        force=True,
    )
