"""Where a model is: a folder as it is, or the hub's files, fetched once."""

from __future__ import annotations

from pathlib import Path


def local_folder(name: str) -> Path:
    """The folder of a model; a name on the hub is fetched, safetensors, JSON and templates only."""
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download

    # No pickle: weights are safetensors, and no code of the repository's is fetched.
    return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt"]))
