"""A checkpoint as a model that teachers and evaluators load: adapters folded in."""

from __future__ import annotations

import shutil
from pathlib import Path

from tutelage.files import make_directory_once

_ADAPTER = "adapter_config.json"


def whole_model(checkpoint: Path) -> Path:
    """The checkpoint itself, or, of an adapter, the model with it merged in, made once beside the checkpoint.

    Args:
        checkpoint: Hugging Face directory of a model, or of a PEFT adapter that names the model it belongs to.

    """
    checkpoint = checkpoint.resolve()
    if not (checkpoint / _ADAPTER).exists():
        return checkpoint

    def merge(folder: Path) -> None:
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer, GenerationConfig

        model = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype="auto").merge_and_unload()
        if (checkpoint / "generation_config.json").exists():  # It may end at more tokens than the base model.
            model.generation_config.eos_token_id = GenerationConfig.from_pretrained(checkpoint).eos_token_id
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
        # As it is: some classes write another pipeline than they read.
        shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")

    return make_directory_once(checkpoint.with_name(f"{checkpoint.name}-merged"), merge)
