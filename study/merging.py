"""A checkpoint as a model that teachers and evaluators load: adapters folded in."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_ADAPTER = "adapter_config.json"


def whole_model(checkpoint: Path) -> Path:
    """The checkpoint itself, or, of an adapter, the model with it merged in, made once beside the checkpoint.

    Args:
        checkpoint: Hugging Face directory of a model, or of a PEFT adapter that names the model it belongs to.

    """
    checkpoint = checkpoint.resolve()
    if not (checkpoint / _ADAPTER).exists():
        return checkpoint
    folder = checkpoint.with_name(f"{checkpoint.name}-merged")
    if not folder.exists():
        _merge(checkpoint, folder)
    return folder


def _merge(adapter: Path, folder: Path) -> None:
    """Writes beside `folder` and renames, so that it is there whole or not at all."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto")
        model.merge_and_unload().save_pretrained(temporary)
        AutoTokenizer.from_pretrained(adapter).save_pretrained(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
