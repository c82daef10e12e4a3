"""Where a model is: a folder as it is, or the hub's files, fetched once."""

from __future__ import annotations

from pathlib import Path

from tutelage.data.hub import local_model


def local_folder(name: str) -> Path:
    """The folder of a model; a name on the hub is fetched, safetensors, JSON and templates only."""
    return local_model(Path(name), "models").resolve()
