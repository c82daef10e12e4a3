"""The signal head of a checkpoint: its matrix from the files, and what follows it from the model's own code.

A scale or a softcap that is left out gives plausible numbers that teach the wrong distribution, and models call them by
many names. So none is read from a configuration: the model's own code (`own_model`) is given states of several sizes,
scale and softcap are what its answers show, and a model whose logits these do not make is refused.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from tutelage.errors import DataError, NotServed
from tutelage.teacher_server.model.own_model import OwnHead, own_logits
from tutelage.teacher_server.signals.logit_head import SignalHead
from tutelage.teacher_server.signals.unembedding import StoredTensors, Unembedding

logger = logging.getLogger(__name__)

_ROWS = 16
# Zero states leave the bias, small ones the matrix and the scale, large ones the softcap.
_SMALL, _LARGE = 1.0, 1024.0  # powers of two: exact in bfloat16
# Logits that a softcap has not bent yet, and states that drive any softcap to its end.
_STRAIGHT, _HUGE = 2.0**-10, 2.0**20
# Of the largest logit. Both sides multiply the same numbers and sum in float32, in another order.
_TOLERANCE = 1 / 512
# Loaded weights, and what the forward pass of a short text needs.
_MEMORY_FACTOR = 1.5

Logits = Callable[[torch.Tensor], torch.Tensor]


def load_unembedding(checkpoint: Path, vocabulary_size: int) -> Unembedding:
    """Reads the head of a checkpoint directory, and finds what the model does after it.

    Args:
        checkpoint: Hugging Face directory with `config.json` and `*.safetensors`.
        vocabulary_size: ids the tokenizer can produce; further rows of the matrix are padding.

    Raises:
        NotServed: the model's own logits are not scale, bias and softcap on the matrix, or its code cannot be asked.
        DataError: the head is not in the files, or has fewer rows than the vocabulary.

    """
    own = OwnHead(checkpoint)
    files = StoredTensors(checkpoint, own.name_of_stored)
    matrix = files.matrix(own.weight_names)
    if len(matrix) < vocabulary_size:
        raise DataError(f"the head has {len(matrix)} rows for {vocabulary_size} token ids", "model")
    bias = files.bias(own.bias_names)
    own.take(matrix, bias)
    scale, softcap = _scale_and_softcap(own, matrix)
    unembedding = Unembedding(
        weight_VD=matrix[:vocabulary_size].contiguous(),
        bias_V=None if bias is None else bias[:vocabulary_size].float().contiguous(),
        scale=scale,
        softcap=softcap,
    )

    def theirs(hidden_RD: torch.Tensor) -> torch.Tensor:
        return own.logits(hidden_RD)[:, :vocabulary_size]

    require_same_logits(theirs, unembedding.logits, own.shape[1])
    return unembedding


def _scale_and_softcap(own: OwnHead, matrix_VD: torch.Tensor) -> tuple[float, float]:
    """What a model's logits are multiplied with, and what bounds them (0 if nothing does), as its answers show."""
    states_RD = _probe(matrix_VD.shape[1])
    plain_RV = states_RD @ matrix_VD.float().T
    at_zero_RV = own.logits(torch.zeros_like(states_RD))
    largest, huge = (own.logits(states_RD * size).abs().max().item() for size in (_SMALL, _HUGE))
    softcap = huge if huge < math.sqrt(_HUGE) * largest else 0.0
    # Where logits are small enough, a softcap changes nothing.
    size = 1.0 if not softcap else 2.0 ** math.floor(math.log2(_STRAIGHT / max(largest, _STRAIGHT)))
    plain_RV, grown_RV = plain_RV.double() * size, (own.logits(states_RD * size) - at_zero_RV).double()
    # Rounded to float32, in which logits are multiplied: that makes 0.0625 of 0.06250000002.
    scale = ((plain_RV * grown_RV).sum() / plain_RV.square().sum()).float()
    return scale.item(), softcap


def check_head(checkpoint: Path, head: SignalHead, token_ids: Sequence[int]) -> torch.Tensor | None:
    """Compares the signal head, on its device, with what it was made of; and computes the model's logits of a text.

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
    require_same_logits(head.unembedding.logits, lambda hidden_RD: head.logits(hidden_RD).cpu(), head.hidden_size)
    quantized = "quantization_config" in json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    if quantized or _MEMORY_FACTOR * size > psutil.virtual_memory().available:
        logger.warning("the model's layers are quantized or larger than free memory: only its head was checked")
        return None
    return own_logits(checkpoint, token_ids, head.vocabulary_size)


def require_same_logits(theirs: Logits, ours: Logits, hidden_size: int) -> None:
    """Refuses a head that makes other logits [R, V] of hidden states [R, D] than the model's own.

    Raises:
        NotServed: the message names what is likely missing.

    """
    sizes = (0.0, _SMALL, _LARGE)
    states = torch.cat([_probe(hidden_size) * size for size in sizes])
    probes = dict(zip(sizes, zip(theirs(states).split(_ROWS), ours(states).split(_ROWS), strict=True), strict=True))
    if not all(_alike(*pair) for pair in probes.values()):
        raise NotServed(
            "the model's own logits are not its states times its head, with a bias, a scale and a softcap, which is "
            f"all that signals can carry; what differs: {_likely_missing(probes)}",
            "model",
        )


def _probe(hidden_size: int) -> torch.Tensor:
    """States of size 1, the same each time; rounded, so that all sides compute with the same numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_ROWS, hidden_size, generator=generator).bfloat16().float()


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
        return f"a softcap on the logits (theirs {theirs_cap}, ours {ours_cap})"
    theirs, ours = probes[_SMALL]
    scale = ((theirs * ours).sum() / ours.square().sum()).item()
    if _alike(theirs, ours * scale):
        return f"a factor of {scale:.3g} on the logits"
    theirs, ours = next(pair for pair in probes.values() if not _alike(*pair))
    apart_V = ((theirs - ours).abs() > _TOLERANCE * max(theirs.abs().max(), ours.abs().max())).any(dim=0)
    return f"{int(apart_V.sum())} of {len(apart_V)} ids (the first is {int(apart_V.nonzero()[0])}), by no common factor"
