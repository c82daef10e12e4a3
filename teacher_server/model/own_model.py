"""The model's own code in transformers: its head without its layers, and all of it for a short text.

What a model does between its final hidden state and its logits stands in its code, not in its files. The code is run
with all its weights but the head's left out (torch's meta device), and with a body that gives the states it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tutelage.errors import NotServed


class _Output(dict[str, Any]):
    """What a model's body returns: its final states, by name or as the first of a tuple, and None for all else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self["last_hidden_state"] if key == 0 else super().__getitem__(key)


class _Body(torch.nn.Module):
    """In place of all layers; also of a part of itself that a model calls (OPT's `model.decoder`)."""

    states_1RD: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return self

    def forward(self, *_arguments: Any, **_named: Any) -> _Output:
        return _Output(last_hidden_state=self.states_1RD)


class OwnHead:
    """What a model makes of its final hidden states, in float32.

    Args:
        checkpoint: Hugging Face directory; only `config.json` is read.

    Raises:
        NotServed: transformers has no code for it that ends in logits.

    """

    def __init__(self, checkpoint: Path) -> None:
        model = _without_weights(checkpoint)
        self._output = model.get_output_embeddings()
        if not isinstance(getattr(self._output, "weight", None), torch.nn.Parameter):
            raise NotServed(f"{type(model).__name__} has no matrix that makes logits of its states", "model")
        self.shape: tuple[int, int] = tuple(self._output.weight.shape)
        """Rows and columns of the matrix."""
        self.weight_names = _names(model, self._output.weight)
        """What the matrix is called, in the order of preference: if it is tied, the embeddings come first."""
        bias = getattr(self._output, "bias", None)
        self.bias_names = [] if bias is None else _names(model, bias)
        self.name_of_stored = _renaming(model)
        """What the model's code calls a tensor that files have under a name."""
        self._body = _Body()
        for name, part in list(model.named_children()):
            if hasattr(part, "base_model_prefix"):  # a model itself
                setattr(model, name, self._body)
        self._model: Any = model.eval()

    def take(self, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> None:
        """Gives it the head's weights."""
        self._output.weight = torch.nn.Parameter(weight_VD.float(), requires_grad=False)
        if bias_V is not None:
            self._output.bias = torch.nn.Parameter(bias_V.float(), requires_grad=False)

    @torch.inference_mode()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 [R, V]: logits of final hidden states that are given.

        Raises:
            NotServed: its code cannot be run on these alone.

        """
        self._body.states_1RD = hidden_RD.float()[None]
        try:
            logits_1RV = self._model(
                input_ids=torch.zeros(1, len(hidden_RD), dtype=torch.int64), use_cache=False
            ).logits
        except Exception as error:  # of whatever kind a model's code raises
            raise NotServed(f"the model's own head cannot be run without its layers: {error!r}", "model") from error
        if logits_1RV.is_meta:
            others = [name for name, parameter in self._model.named_parameters() if parameter.is_meta]
            raise NotServed(
                f"between its states and its logits the model has more weights: {', '.join(others)}", "model"
            )
        return logits_1RV[0].float()  # type: ignore[no-any-return]


@torch.inference_mode()
def own_logits(checkpoint: Path, token_ids: Sequence[int], vocabulary_size: int) -> torch.Tensor:
    """float32 [T, V]: the whole model's logits after each token of a text, on the CPU, in the dtype it is stored in."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    dtype = _config(checkpoint).dtype
    # Large states overflow in float16.
    dtype = torch.float32 if dtype in (None, torch.float16) else dtype
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, use_safetensors=True).eval()
    logits: torch.Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
    return logits[0, :, :vocabulary_size].float()


def _without_weights(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = _config(checkpoint)
    if hasattr(config, "quantization_config"):  # of the layers; the head is dequantized when it is read
        del config.quantization_config
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            with torch.device("meta"), no_init_weights():
                model = auto.from_config(config, dtype=torch.float32)
                model.tie_weights()
            return model
    raise NotServed(f"transformers has no model of type {config.model_type!r} that makes logits", "model")


def _config(checkpoint: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)


def _renaming(model: Any) -> Callable[[str], str]:
    """As transformers renames tensors when it loads them: prefixes of other classes, names of other versions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    known, prefix = model.state_dict(), model.base_model_prefix
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return lambda name: str(rename_source_key(name, renamings, [], prefix, known)[0])


def _names(model: Any, parameter: torch.nn.Parameter) -> list[str]:
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
