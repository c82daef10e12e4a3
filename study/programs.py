"""The services' commands, as this Python runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

_RUN = "import sys; from tutelage.cli import main; sys.exit(main())"


def tutelage(*arguments: str) -> list[str]:
    """`tutelage …` in this environment, whatever PATH says."""
    return [sys.executable, "-c", _RUN, *arguments]


def flags(options: Mapping[str, object]) -> list[str]:
    """`--name value …`, with dashes for underscores."""
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", _text(value))]


def environment() -> dict[str, str]:
    """Of every service of a study: one thread a process, since many share the machine."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
