"""Adapters beside a model's frozen weights (LoRA: Hu et al. 2021, arXiv 2106.09685), by peft.

The model itself is changed in place, so forward, backward and sampling go through the adapters without knowing of
them; the handle that comes back writes the standard adapter directory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ConfigurationError
from tutelage.trainer.config.student import LoraConfig


def add_adapters(model: Any, settings: LoraConfig, *, seed: int) -> Any:
    """Freezes the model, adds adapters in its dtype, and returns peft's handle on them.

    Args:
        model: a transformers causal language model.
        settings: where, how wide.
        seed: of the adapters' first values; they change no logit before the first step.

    Raises:
        ConfigurationError: a target is the name of no linear layer of the model.

    """
    import peft

    # peft passes over a target that it does not find as long as it finds another.
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in settings.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ConfigurationError(
                f"{target!r} is no linear layer of {type(model).__name__}; it has {', '.join(known)}",
                "lora.target_modules",
            )
    # peft draws B = 0 and A from the global generator.
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.target_modules),
    )
    # As with full fine-tuning the float32 copies are the optimizer's, not the model's.
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


@torch.no_grad()
def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's weights by the names that they have without adapters, one after the other.

    Where there is an adapter: W + (lora_alpha / r) · B · A, in float32 (Hu et al. 2021, §4.1). In bfloat16 an update
    below 2⁻⁸ of its weight would be rounded away.
    """
    adapted = {f"{name}.base_layer.weight": layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    # The state dict has tied weights under each of their names.
    for name, tensor in model.state_dict().items():
        if name in adapted:
            layer = adapted[name]
            for adapter, scale in layer.scaling.items():
                update = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
                tensor = tensor.float() + scale * update
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor
