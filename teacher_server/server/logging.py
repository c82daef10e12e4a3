"""What the server says on standard error: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
import os
import time
from datetime import UTC, datetime
from typing import Literal

FIELDS = ("student", "request")
"""What a message may carry besides its text, by `extra=`."""


class _Readable(logging.Formatter):
    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()

    def format(self, record: logging.LogRecord) -> str:
        """The message, with the seconds since the start, and whom it is about."""
        about = " ".join(f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name))
        text = f"teacher {time.monotonic() - self._started:6.1f} s  {record.getMessage()}"
        return f"{text} ({about})" if about else text


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The message and what it carries; control characters of a student's are escaped by JSON."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(line | {name: getattr(record, name) for name in FIELDS if hasattr(record, name)})


def to_stderr(form: Literal["text", "json"]) -> None:
    """Sends our own messages to standard error; vLLM logs by itself."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if form == "json" else _Readable())
    for name in ("teacher_server", "tutelage"):
        own = logging.getLogger(name)
        own.addHandler(handler)
        own.setLevel(os.environ.get("TUTELAGE_LOG_LEVEL", "INFO"))
        own.propagate = False
