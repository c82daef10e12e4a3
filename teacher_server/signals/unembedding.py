"""The matrix that turns hidden states into logits, read from a checkpoint's files, and what follows it.

A matrix that is stored as fp8 or int8 is dequantized once, when it is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import DataError, NotServed

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_SCALES = ("weight_scale", "weight_scale_inv")  # compressed-tensors; DeepSeek, whose "inverse" is multiplied with, too
_BLOCK = (128, 128)  # of DeepSeek's fp8, where a configuration does not say
_READ = "read are fp8 and int8 with scales, without zero points"


@dataclass(frozen=True)
class Unembedding:
    """logits = scale · (hidden · weightᵀ + bias), then softcap · tanh(logits / softcap) if softcap > 0."""

    weight_VD: torch.Tensor
    """[vocabulary_size, hidden_size], bfloat16 or float32; padded rows are cut off."""

    bias_V: torch.Tensor | None
    """float32 [vocabulary_size], if the head has one."""

    scale: float
    """What logits are multiplied with."""

    softcap: float
    """0 if there is none."""

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 [R, V] of states, computed plainly and on the CPU: what the signal head is compared with."""
        logits_RV = hidden_RD.float() @ self.weight_VD.float().T
        if self.bias_V is not None:
            logits_RV = logits_RV + self.bias_V
        logits_RV = logits_RV * self.scale
        return logits_RV if not self.softcap else self.softcap * (logits_RV / self.softcap).tanh()

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of the rows' bytes in order, followed by the bias' bytes if there is one."""
        total = hashlib.sha256(rows_bytes(self.weight_VD))
        if self.bias_V is not None:
            total.update(rows_bytes(self.bias_V))
        return total.hexdigest()


def rows_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a contiguous CPU tensor, without a copy."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


class StoredTensors:
    """The tensors of a checkpoint's safetensors files.

    Args:
        checkpoint: directory with `*.safetensors`.
        name_of_stored: what the model's code calls a tensor that the files have under a name.

    """

    def __init__(self, checkpoint: Path, name_of_stored: Callable[[str], str]) -> None:
        from safetensors import safe_open

        self._checkpoint = checkpoint
        self._file_of: dict[str, Path] = {}
        for path in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), path))
        self._stored = {name_of_stored(name): name for name in self._file_of}

    def matrix(self, names: Sequence[str]) -> torch.Tensor:
        """The head's matrix, bfloat16 or float32; dequantized if it is stored as fp8 or int8.

        Args:
            names: what the model's code calls it, in the order of preference.

        Raises:
            NotServed: it is quantized in a form that is not read here.
            DataError: it is not in the files.

        """
        stored = next((self._stored[name] for name in names if name in self._stored), None)
        if stored is not None:
            return self._as_served(stored)
        stems = {name.rpartition(".")[0] for name in names}
        packed = [each for name, each in self._stored.items() if name.rpartition(".")[0] in stems]
        if packed:
            raise NotServed(f"the head is stored as {', '.join(packed)}; {_READ}", "model")
        raise DataError(f"{self._checkpoint} holds no head: no tensor of it is {' or '.join(names)}", "model")

    def bias(self, names: Sequence[str]) -> torch.Tensor | None:
        """The head's bias; None if the files have none, which models take for zeros."""
        stored = next((self._stored[name] for name in names if name in self._stored), None)
        return None if stored is None else self._read(stored)

    def _read(self, stored: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._file_of[stored], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(stored)
        return tensor

    def _as_served(self, stored: str) -> torch.Tensor:
        import torch

        weight_VD = self._read(stored)
        if weight_VD.dtype in (torch.bfloat16, torch.float32):
            return weight_VD
        # float32 holds every float16 number; bfloat16, which the contract has besides, does not.
        if weight_VD.dtype == torch.float16:
            return weight_VD.float()
        stem = stored.rpartition(".")[0]
        scale = next((f"{stem}.{each}" for each in _SCALES if f"{stem}.{each}" in self._file_of), None)
        known = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
        if scale is None or weight_VD.dtype not in known or f"{stem}.weight_zero_point" in self._file_of:
            raise NotServed(f"the head is stored as {weight_VD.dtype}; {_READ}", "model")
        logger.info("the head is stored as %s; it is dequantized to bfloat16, once", weight_VD.dtype)
        return (weight_VD.float() * self._spread(self._read(scale).float(), weight_VD.shape)).bfloat16()

    def _spread(self, scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A scale for each element: of one for all, one for each row, or one for each block."""
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        if scale.numel() == shape[0]:
            return scale.reshape(-1, 1)
        settings = json.loads((self._checkpoint / "config.json").read_text(encoding="utf-8"))
        rows, columns = settings.get("quantization_config", {}).get("weight_block_size") or _BLOCK
        if tuple(scale.shape) != (-(-shape[0] // rows), -(-shape[1] // columns)):
            given = f"a head of {tuple(shape)} has scales of {tuple(scale.shape)}"
            raise NotServed(f"{given}; read are one, one a row, and one a block of {rows} by {columns}", "model")
        return scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
