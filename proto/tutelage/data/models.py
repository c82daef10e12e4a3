"""Whether a model can be loaded, seen before anything heavy loads it; and which commit of one on the hub is meant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tutelage.data.hub import local_model
from tutelage.errors import ConfigurationError, DataError, TutelageError

_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100 * 2**20  # as safetensors has it


def pinned(model: Path, field: str) -> Path:
    """OWNER/NAME@COMMIT of a model on the hub that is named otherwise; anything else as it is.

    So that every process of a run, on whatever machine, and each that goes on with it, has the same weights.

    Args:
        model: a folder, or a name on the hub.
        field: what named it, for the error.

    Raises:
        CheckpointError: as `tutelage.data.hub.local_model`.

    """
    folder = local_model(model, field)
    if folder == model or folder.parent.name != "snapshots":
        return model
    return Path(f"{str(model).partition('@')[0]}@{folder.name}")


def check_model(folder: Path, field: str) -> None:
    """Looks whether a folder holds a causal language model that can be loaded; reads no tensor.

    Args:
        folder: of a model, or of a PEFT adapter.
        field: what named it, for the error.

    Raises:
        DataError: as `check_weights`, or it has no tokenizer.json.
        ConfigurationError: as `check_weights`.

    """
    check_weights(folder, field)
    with _naming(field):
        _json_object(folder / "tokenizer.json")


def check_weights(folder: Path, field: str) -> None:
    """As `check_model`, but whatever tokenizer it has.

    Raises:
        DataError: it has no configuration or no safetensors, or a file is damaged or may not be read.
        ConfigurationError: it needs code of its own.

    """
    with _naming(field):
        adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
        config = _json_object(folder / ("adapter_config.json" if adapter else "config.json"))
        _refuse_own_code(config, folder)
        for file in _weights(folder, "adapter_model" if adapter else "model"):
            _check_safetensors(file)


@contextmanager
def _naming(field: str) -> Iterator[None]:
    try:
        yield
    except TutelageError as error:
        raise type(error)(error.message, field) from error
    except PermissionError as error:
        raise DataError(f"this user may not read {error.filename}; have its owner allow it", field) from error


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file.parent} has no {file.name}; give the folder of a model") from error
    except ValueError as error:
        raise DataError(f"{file} cannot be read: {error}; fetch the model again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds {type(content).__name__}, expected an object; fetch the model again")
    return content


def _refuse_own_code(config: dict[str, Any], folder: Path) -> None:
    if "auto_map" not in config:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise ConfigurationError(
            f"{folder} needs code of its own ({config.get('model_type')!r} is no architecture of the installed "
            "transformers), which is not run; give a model that transformers has"
        )


def _weights(folder: Path, stem: str) -> list[Path]:
    """The files of its weights, all of which are there."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_json_object(index).get("weight_map", {}).values()))]
    else:
        files = [folder / f"{stem}.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            advice = (
                "only safetensors are loaded, since a pickle can run code: load it with transformers where you trust "
                "it, and save it again with save_pretrained"
                if pickled
                else "fetch the model again"
            )
            raise DataError(f"{folder} has no {file.name}; {advice}")
    return files


def _check_safetensors(file: Path) -> None:
    """Its header says where the last tensor ends, which is where the file must end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        header = stream.read(length) if length <= min(size, _LONGEST_HEADER_BYTES) else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{file} is no file of safetensors, or its beginning is damaged; fetch it again") from error
    if end != size:
        raise DataError(f"{file} has {size:,} bytes and its header says {end:,}: it was cut off; fetch it again")
