"""What a student receives of its teacher, one row per scored position.

Rows that the loss must not see are left out before they get here. Shapes: the legend in docs/architecture.md; V is the
tokenizer's vocabulary, without rows of the head that no token has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

Rows: TypeAlias = slice | Tensor
"""A choice of rows: a slice, a boolean mask [N] or indices."""


# Of a head that is widened at once: small enough to stay in a cache until it is multiplied.
_TILE_BYTES = 8 * 2**20


def accurate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which probabilities are computed: float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Unembedding:
    """Turns hidden states into raw logits: softcap · tanh(scale · (hidden · matrixᵀ + bias) / softcap).

    Rows of the matrix beyond the tokenizer's vocabulary (padding) must be cut off before: they belong to no
    distribution.
    """

    # Cohere multiplies logits by a factor, Granite divides them, Gemma bounds them by a tanh, Phi's head has a bias.
    matrix_VD: Tensor
    """[V, D]; its dtype is that of the product's factors."""
    bias_V: Tensor | None = None
    """[V], or None."""
    scale: float = 1.0
    """Factor on the logits, 1 if the model has none."""
    softcap: float = 0.0
    """Bound of the logits' magnitude, 0 if the model has none."""
    beyond: Unembedding | None = None
    """Of a teacher: the ids that only it has, which belong to no distribution that a student is compared with."""

    def at(self, ids: slice) -> Unembedding:
        """Some of the ids."""
        bias_V = None if self.bias_V is None else self.bias_V[ids]
        return Unembedding(self.matrix_VD[ids], bias_V, self.scale, self.softcap)

    def mass_beyond(self, hidden_ND: Tensor) -> Tensor | None:
        """The probability, at temperature 1, that ids have which only the teacher has, [N]; None if there are none."""
        if self.beyond is None:
            return None
        own_N, beyond_N = (head.logits(hidden_ND).logsumexp(-1) for head in (self, self.beyond))
        return (beyond_N - own_N).sigmoid()

    @property
    def vocabulary_size(self) -> int:
        """V."""
        return self.matrix_VD.shape[0]

    def product(self, hidden_ND: Tensor) -> Tensor:
        """Hidden · matrixᵀ, [N, V]: factors in the matrix's dtype, sums in float32 (float64 from float64).

        A result in bfloat16 would round a logit of 40 by up to 0.125: more than what a student that is near its teacher
        differs by.
        """
        hidden_ND = hidden_ND.to(self.matrix_VD.dtype)
        if self.matrix_VD.dtype != torch.bfloat16:
            return hidden_ND @ self.matrix_VD.T
        if hidden_ND.is_cuda:
            return torch.mm(hidden_ND, self.matrix_VD.T, out_dtype=torch.float32)
        return _product_on_cpu(hidden_ND.float(), self.matrix_VD)

    def finish(self, product_NV: Tensor) -> Tensor:
        """Logits [N, V], a tensor of its own, from `product`."""
        logits_NV = product_NV.clone()
        if self.bias_V is not None:
            logits_NV = logits_NV.add_(self.bias_V.detach())
        if self.scale != 1.0:
            logits_NV = logits_NV.mul_(self.scale)
        if self.softcap > 0.0:
            logits_NV = logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def finish_backward(self, gradient_NV: Tensor, logits_NV: Tensor) -> Tensor:
        """The gradient at `product`, given that at the logits and the logits that `finish` returned."""
        if self.softcap > 0.0:
            gradient_NV = gradient_NV * (1.0 - (logits_NV / self.softcap).square())
        return gradient_NV if self.scale == 1.0 else gradient_NV * self.scale

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Raw logits [N, V] in float32 (float64 from float64), without a gradient."""
        with torch.no_grad():
            return self.finish(self.product(hidden_ND))


def _product_on_cpu(hidden_ND: Tensor, matrix_VD: Tensor) -> Tensor:
    """Float32 · bfloat16ᵀ, [N, V] in float32, for a device whose own product of bfloat16 factors is rounded to them.

    The matrix is widened a tile at a time. (`torch.mm` knows `out_dtype` on CUDA only. That float32 products may take
    bfloat16 factors, as the server has it, is a setting of the process, and would reach what other threads compute.)
    """
    product_NV = hidden_ND.new_empty(len(hidden_ND), len(matrix_VD))
    rows = max(1, _TILE_BYTES // (4 * matrix_VD.shape[1]))
    for start in range(0, len(matrix_VD), rows):
        tile = slice(start, start + rows)
        torch.mm(hidden_ND, matrix_VD[tile].float().T, out=product_NV[:, tile])
    return product_NV


@dataclass(frozen=True)
class TopKRows:
    """The teacher's K largest logits of each row."""

    ids_NK: Tensor
    """int64 [N, K], no id twice in a row, short rows padded with -1 after at least one id."""
    logits_NK: Tensor
    """float32 [N, K]: raw logits of those ids; ignored where the id is -1."""
    logsumexp_N: Tensor
    """float32 [N]: ln Σ_v exp(z_v / T) over the vocabulary, at the teacher temperature T of the run."""
    target_logits_N: Tensor | None = None
    """float32 [N]: the raw logit of the token that follows; only sampled-token estimators need it."""
    sequence_digest_N: Tensor | None = None
    """int64 [N]: as in `HiddenRows`; only (approximate) noise needs it."""
    position_N: Tensor | None = None
    """int64 [N]: as in `HiddenRows`; only (approximate) noise needs it."""

    kind: ClassVar[Literal["topk"]] = "topk"

    def __len__(self) -> int:
        return self.logsumexp_N.shape[0]

    def at(self, rows: Rows) -> TopKRows:
        """Some of the rows."""
        return TopKRows(**_at(vars(self), rows))

    @property
    def kept_ids(self) -> Tensor:
        """The ids of the support."""
        return self.ids_NK

    @property
    def kept_logits(self) -> Tensor:
        """Their raw logits."""
        return self.logits_NK


@dataclass(frozen=True)
class CandidateRows:
    """The teacher's logits at ids that the student chose."""

    ids_NC: Tensor
    """int64 [N, C], no id twice in a row, short rows padded with -1 after at least one id."""
    logits_NC: Tensor
    """float32 [N, C]: raw logits of those ids; ignored where the id is -1."""
    logsumexp_N: Tensor
    """float32 [N]: as in `TopKRows`."""
    target_logits_N: Tensor | None = None
    """float32 [N]: as in `TopKRows`."""
    sequence_digest_N: Tensor | None = None
    """int64 [N]: as in `HiddenRows`; only (approximate) noise needs it."""
    position_N: Tensor | None = None
    """int64 [N]: as in `HiddenRows`; only (approximate) noise needs it."""

    kind: ClassVar[Literal["candidates"]] = "candidates"

    def __len__(self) -> int:
        return self.logsumexp_N.shape[0]

    def at(self, rows: Rows) -> CandidateRows:
        """Some of the rows."""
        return CandidateRows(**_at(vars(self), rows))

    @property
    def kept_ids(self) -> Tensor:
        """The ids of the support."""
        return self.ids_NC

    @property
    def kept_logits(self) -> Tensor:
        """Their raw logits."""
        return self.logits_NC


@dataclass(frozen=True)
class HiddenRows:
    """The teacher's final hidden states, from which every logit follows."""

    hidden_ND: Tensor
    """bfloat16 [N, D of the teacher]; float32 of a teacher in the student's process."""
    sequence_digest_N: Tensor
    """int64 [N]: the digest of the row's sequence, as `tutelage.rpc.codec.sequence_digest` (two's complement)."""
    position_N: Tensor
    """int64 [N]: the row's position in its sequence, 0 … 2³²-1."""
    unembedding: Unembedding
    """The teacher's."""

    kind: ClassVar[Literal["hidden"]] = "hidden"

    def __len__(self) -> int:
        return self.hidden_ND.shape[0]

    def at(self, rows: Rows) -> HiddenRows:
        """Some of the rows."""
        return HiddenRows(self.hidden_ND[rows], self.sequence_digest_N[rows], self.position_N[rows], self.unembedding)


def _at(tensors: dict[str, Any], rows: Rows) -> dict[str, Any]:
    return {name: None if tensor is None else tensor[rows] for name, tensor in tensors.items()}


BucketedRows: TypeAlias = TopKRows | CandidateRows
TeacherRows: TypeAlias = TopKRows | CandidateRows | HiddenRows
