"""Is the signal head the model's own? Compared with the checkpoint in transformers before anything is served.

What a model does between its final hidden state and its logits stands in its code, not in its files: a scale
or a softcap that is left out gives plausible numbers that teach the wrong distribution. So the model's own code
is given states of several sizes, and ours must make the same logits of them. Besides, its logits of a short
text are kept, for the comparison with what the engine's states give (`self_check.check_states`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from tutelage.errors import NotServed
from tutelage.teacher_server.signals.logit_head import SignalHead

logger = logging.getLogger(__name__)

_ROWS = 16
# Zero states leave the bias, small ones the matrix and the scale, large ones the softcap.
_SMALL, _LARGE = 1.0, 1024.0  # powers of two: exact in bfloat16
# Of the largest logit. bfloat16 logits are known to 1/256, and to a little less after a matrix product.
_TOLERANCE = 1 / 32
# Loaded weights, and what the forward pass of a short text needs.
_MEMORY_FACTOR = 1.5

Logits = Callable[[torch.Tensor], torch.Tensor]


class OwnModel:
    """A checkpoint in transformers, on the CPU, in the dtype in which it is stored.

    Args:
        checkpoint: Hugging Face directory.
        vocabulary_size: ids the tokenizer can produce; further logits are cut off.
        whole: with its layers; without them only `logits_of_states` can be asked for.

    """

    def __init__(self, checkpoint: Path, vocabulary_size: int, *, whole: bool) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(checkpoint)
        if not whole:
            transformers_logging.set_verbosity_error()  # it would list the layers that we leave out
            config.num_hidden_layers = 0
            if getattr(config, "layer_types", None):
                config.layer_types = []
            if hasattr(config, "quantization_config"):  # of the layers; a head that is quantized is not served
                del config.quantization_config
        # Large states overflow in float16.
        dtype = torch.float32 if config.dtype in (None, torch.float16) else config.dtype
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=dtype, use_safetensors=True)
        self._model: Any = model.eval()
        self._vocabulary_size = vocabulary_size

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, V] of a text; needs the layers."""
        return self._forward(torch.tensor([token_ids]))

    def logits_of_states(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 [R, V]: what the model makes of final hidden states that are given to it."""
        hidden_1RD = hidden_RD.to(self._model.dtype)[None]

        # transformers has no way to give a causal model its last hidden state; a hook on the body under its head does.
        def replace_states(_module: Any, _arguments: Any, output: Any) -> None:
            output.last_hidden_state = hidden_1RD

        hook = self._model.base_model.register_forward_hook(replace_states)
        try:
            return self._forward(torch.zeros(1, len(hidden_RD), dtype=torch.int64))
        finally:
            hook.remove()

    @torch.inference_mode()
    def _forward(self, ids_1T: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=ids_1T, use_cache=False).logits[0, :, : self._vocabulary_size]
        return logits.float()


def check_head(checkpoint: Path, head: SignalHead, token_ids: Sequence[int]) -> torch.Tensor | None:
    """Compares the signal head with the model's own code, and computes the model's logits of a text.

    Args:
        checkpoint: Hugging Face directory.
        head: made from it.
        token_ids: the text.

    Returns:
        float32 [T, V]: the model's logits after each token; None where its layers cannot be run beside the
        engine, because they are quantized or need more memory than is free.

    Raises:
        NotServed: the logits differ; the message names what is likely missing.

    """
    quantized = "quantization_config" in json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    whole = not quantized and _MEMORY_FACTOR * size < psutil.virtual_memory().available
    own = OwnModel(checkpoint, head.vocabulary_size, whole=whole)
    require_same_logits(own.logits_of_states, lambda hidden_RD: head.logits(hidden_RD).cpu(), head.hidden_size)
    if not whole:
        logger.warning("the model's layers are quantized or larger than free memory: only its head was checked")
        return None
    return own.logits(token_ids)


def require_same_logits(theirs: Logits, ours: Logits, hidden_size: int) -> None:
    """Refuses a head that makes other logits [R, V] of hidden states [R, D] than the model's own.

    Raises:
        NotServed: the message names what is likely missing.

    """
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that both compute with the same numbers.
    states_RD = torch.randn(_ROWS, hidden_size, generator=generator).bfloat16().float()
    sizes = (0.0, _SMALL, _LARGE)
    states = torch.cat([states_RD * size for size in sizes])
    probes = dict(zip(sizes, zip(theirs(states).split(_ROWS), ours(states).split(_ROWS), strict=True), strict=True))
    if not all(_alike(*pair) for pair in probes.values()):
        raise NotServed(
            f"the signal head does not make the model's own logits; likely missing: {_likely_missing(probes)}. "
            "Teach teacher_server/signals/unembedding.py this model's head",
            "model",
        )


def _alike(theirs_RV: torch.Tensor, ours_RV: torch.Tensor) -> bool:
    largest = max(theirs_RV.abs().max().item(), ours_RV.abs().max().item())
    return (theirs_RV - ours_RV).abs().max().item() <= _TOLERANCE * largest


def _likely_missing(probes: dict[float, tuple[torch.Tensor, torch.Tensor]]) -> str:
    """What would explain the difference, by the sizes of the states at which it shows."""
    theirs, ours = probes[0.0]
    if not _alike(theirs, ours):
        return f"a bias on the logits (of up to {theirs.abs().max():.3g}; ours {ours.abs().max():.3g})"

    def cap(side: int) -> float | None:
        """What bounds the logits, if they do not grow with the states."""
        small, bound = (probes[size][side].abs().max().item() for size in (_SMALL, _LARGE))
        return round(bound, 1) if bound < 0.5 * _LARGE / _SMALL * small else None

    theirs_cap, ours_cap = cap(0), cap(1)
    if theirs_cap != ours_cap and None in (theirs_cap, ours_cap):
        return f"a softcap on the logits (final_logit_softcapping; theirs {theirs_cap}, ours {ours_cap})"
    theirs, ours = probes[_SMALL]
    scale = ((theirs * ours).sum() / ours.square().sum()).item()
    if _alike(theirs, ours * scale):
        return f"a factor of {scale:.3g} on the logits (logit_scale, logits_scaling)"
    return "the matrix itself (is it tied to the embeddings?), or something before it"
