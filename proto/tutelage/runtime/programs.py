"""The services' commands, as this Python runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

# Not the `tutelage` script: beside this interpreter there is none where the package is only on PYTHONPATH.
_RUN = "import sys; from tutelage.cli import main; sys.exit(main())"


def tutelage(*arguments: str) -> list[str]:
    """`tutelage …` in this environment, whatever PATH says."""
    return [sys.executable, "-c", _RUN, *arguments]


def flags(options: Mapping[str, object]) -> list[str]:
    """`--name value …`, with dashes for underscores; `--name` or `--no-name` for what is true or false."""
    parts = []
    for name, value in options.items():
        dashed = name.replace("_", "-")
        parts += [f"--{'' if value else 'no-'}{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
    return parts


def shared_machine() -> dict[str, str]:
    """The environment of programs that share a machine with many: one thread a process."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TOKENIZERS_PARALLELISM": "false"}
