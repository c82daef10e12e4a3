"""A checkpoint as a model that teachers and evaluators load: adapters folded in, no trainer's state beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_ADAPTER = "adapter_config.json"
_TRAINERS = ("trainer_state.safetensors", "state.json", "MANIFEST.json")


def whole_model(checkpoint: Path) -> Path:
    """The checkpoint itself, or, of an adapter, the model with it merged in, made once beside the checkpoint.

    Args:
        checkpoint: Hugging Face directory of a model, or of a PEFT adapter that names the model it belongs to.

    """
    checkpoint = checkpoint.resolve()
    if not (checkpoint / _ADAPTER).exists():
        return checkpoint
    return _made_once(checkpoint.with_name(f"{checkpoint.name}-merged"), lambda out: _merge(checkpoint, out))


def served_model(checkpoint: Path) -> Path:
    """`whole_model` without the trainer's files: an engine takes every safetensors file of a folder for weights."""
    model = whole_model(checkpoint)
    if not (model / _TRAINERS[0]).exists():
        return model
    return _made_once(model.with_name(f"{model.name}-model"), lambda out: _link_model(model, out))


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Calls `make(temporary)` and renames to `folder`, unless `folder` is there."""
    if not folder.exists():
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(temporary)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def _merge(adapter: Path, out: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto")
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)


def _link_model(checkpoint: Path, out: Path) -> None:
    for path in checkpoint.iterdir():
        if path.name not in _TRAINERS:
            os.link(path, out / path.name)
