"""Files of data sets on the Hugging Face hub, named as fsspec and Polars name them: hf://datasets/OWNER/NAME/FILE."""

from __future__ import annotations

from pathlib import Path

from tutelage.errors import DataError

_SCHEME = "hf:"
_FORM = "hf://datasets/OWNER/NAME/FILE, or NAME@REVISION for a branch, a tag or, better, a commit"


def is_on_hub(path: Path) -> bool:
    """Whether a path names a file on the hub: `hf://…`, or `hf:/…`, which a `Path` makes of it."""
    return path.parts[:1] == (_SCHEME,)


def local_file(path: Path) -> Path:
    """Where a file is on this machine: the path itself, or of `hf://…` what the hub gave, now or before.

    Args:
        path: of a file; of `hf://datasets/OWNER/NAME[@REVISION]/FILE` a `Path` keeps `hf:/datasets/…`, which is taken
            for the same.

    Raises:
        DataError: the name is not of that form, or neither the hub nor its cache has the file.

    """
    if not is_on_hub(path):
        return path
    if len(path.parts) < 5 or path.parts[1] != "datasets":
        raise DataError(f"{path} is not of the form {_FORM}")
    from huggingface_hub import hf_hub_download

    owner, (name, _, revision) = path.parts[2], path.parts[3].partition("@")
    try:
        return Path(
            hf_hub_download(f"{owner}/{name}", "/".join(path.parts[4:]), repo_type="dataset", revision=revision or None)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"the hub does not give {path}: {error}; give {_FORM}, or the path of a file") from error
