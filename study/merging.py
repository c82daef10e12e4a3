"""Adapters folded into their model, since teachers and evaluators load whole models."""

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
    merged = checkpoint.with_name(f"{checkpoint.name}-merged")
    if not merged.exists():
        temporary = Path(tempfile.mkdtemp(prefix=f".{merged.name}-", dir=merged.parent))
        try:
            _merge(checkpoint, temporary)
            temporary.chmod(0o755)
            os.replace(temporary, merged)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return merged


def _merge(adapter: Path, out: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto")
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)
