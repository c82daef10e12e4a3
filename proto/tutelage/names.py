"""Names that become metadata keys, folders and Ray actors: one rule, one place."""

from __future__ import annotations

import re

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
