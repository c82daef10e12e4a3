"""Names that become metadata keys, folders and Ray actors: one rule, one place."""

from __future__ import annotations

import re
from pathlib import Path

from tutelage.errors import ConfigurationError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")


def check_name(name: str, field: str) -> str:
    """The name itself if it is 1 … 64 of a-z 0-9 . _ - and starts with a letter or digit.

    Raises:
        ConfigurationError: any other name, `../x` and the like among them.

    """
    if not _NAME.match(name):
        raise ConfigurationError(
            f"{name!r} is not a name; use 1 to 64 of a-z, 0-9, '.', '_', '-', starting with a letter or digit",
            field,
        )
    return name


def folder_of(root: Path, name: str, field: str) -> Path:
    """`root/name`, which lies directly in `root`, whatever links there are.

    Raises:
        ConfigurationError: the name is not allowed, or a link leads out of `root`.

    """
    folder = root / check_name(name, field)
    if folder.resolve().parent != root.resolve():
        raise ConfigurationError(f"{folder} leads out of {root}", field)
    return folder
