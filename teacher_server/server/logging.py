"""What the server says on standard error: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import logging
import os
import time
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


def to_stderr(form: Literal["text", "json"]) -> None:
    """Sends our own messages to standard error; vLLM logs by itself."""
    handler = logging.StreamHandler()
    if form == "json":
        # Only here: the command's help, and a dry run, answer where the extra `teacher` is not installed.
        from pythonjsonlogger.json import JsonFormatter

        as_json = JsonFormatter(
            ["levelname", "name", "message"],
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp="time",  # with the time zone, which `%(asctime)s` lacks
        )
        handler.setFormatter(as_json)
    else:
        handler.setFormatter(_Readable())
    own = logging.getLogger("tutelage")
    own.addHandler(handler)
    own.setLevel(os.environ.get("TUTELAGE_LOG_LEVEL", "INFO"))
    own.propagate = False
