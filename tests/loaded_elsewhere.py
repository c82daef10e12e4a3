"""What others see in a checkpoint: logits of `transformers` or vLLM, in a process that knows nothing of the trainer.

    python loaded_elsewhere.py transformers|vllm OUTPUT.safetensors BASE FULL_CHECKPOINT ADAPTER_CHECKPOINT

Writes float32 log-probabilities [T-1, V] of positions 0 … T-2 of one fixed sequence, by name `full` and `adapter`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

IDS = list(range(30, 62))


def transformers_logps(base: Path, full: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """In the dtype of the files, as their users get them by default."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    below = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    models = {
        "full": AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16),
        "adapter": PeftModel.from_pretrained(below, adapter, autocast_adapter_dtype=False),
    }
    with torch.no_grad():
        logits = {name: model.eval()(torch.tensor([IDS])).logits[0, :-1] for name, model in models.items()}
    return {name: value.float().log_softmax(-1) for name, value in logits.items()}


def vllm_logps(base: Path, full: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """In float32: vLLM's bfloat16 rounds elsewhere than that of transformers."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    def logps(model: Path, request: LoRARequest | None) -> torch.Tensor:
        llm = LLM(
            str(model),
            dtype="float32",
            max_model_len=64,
            enforce_eager=True,
            max_logprobs=-1,
            enable_lora=request is not None,
            max_lora_rank=8,
        )
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=-1)
        (output,) = llm.generate({"prompt_token_ids": IDS}, parameters, lora_request=request)
        rows = output.prompt_logprobs[1:]
        return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])

    return {"full": logps(full, None), "adapter": logps(base, LoRARequest("student", 1, str(adapter)))}


if __name__ == "__main__":
    engine, output, *folders = sys.argv[1:]
    found = {"transformers": transformers_logps, "vllm": vllm_logps}[engine](*map(Path, folders))
    save_file({name: value.contiguous() for name, value in found.items()}, output)
