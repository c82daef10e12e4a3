"""What is named on the Hugging Face hub: files of data sets, as fsspec and Polars name them, and models.

hf://datasets/OWNER/NAME/FILE, OWNER/NAME
"""

from __future__ import annotations

import re
from pathlib import Path

from tutelage.errors import CheckpointError, DataError

_SCHEME = "hf:"
_MODEL = re.compile(r"(?:[\w.-]+/)?[\w.-]*\w\Z")
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
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


def require_model_name(model: Path, field: str) -> None:
    """Looks whether a name is a folder's, or may be that of a model on the hub, which is not asked.

    Raises:
        CheckpointError: it is neither.

    """
    if not model.is_dir() and (model.exists() or not _MODEL.match(str(model).partition("@")[0])):
        raise CheckpointError(f"{model} is no folder; give that of a model, or OWNER/NAME of one on the hub", field)


def local_model(model: Path, field: str) -> Path:
    """The folder of a model on this machine: the path itself, or what the hub gave of a name, now or before.

    Args:
        model: a folder; or OWNER/NAME[@REVISION] of a model on the hub, where no such folder is.
        field: what named the model, for the error.

    Raises:
        CheckpointError: it is no folder, and neither the hub nor its cache has a model of that name.

    """
    require_model_name(model, field)
    if model.is_dir():
        return model
    from huggingface_hub import snapshot_download

    name, _, revision = str(model).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_MODEL_FILES)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{model} is no folder here, and the hub does not give it: {reason}", field) from error
