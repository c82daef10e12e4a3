"""Turns hidden states into signals: top-k, candidates, log-sum-exp at any temperature, exactly and in chunks.

Shape letters: docs/architecture.md. Here R rows (scored positions), G groups of vocabulary ids, M temperatures.

The multiplication takes bfloat16 factors and sums in float32, so logits are as exact as the hidden states.
Rounding logits to bfloat16, as a bfloat16 matrix product would, moves logits of 16 … 32 by up to 0.06.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tutelage.teacher_server.signals.unembedding import Unembedding

# Logits computed for one pass over the matrix, by default: its 256 rows of 49,152 make the pass cheap for each row.
CHUNK_LOGITS_BYTES = 48 * 2**20
# A chunk's logits, and at most as much for what is computed of them.
COPIES_OF_LOGITS = 2
# Logits computed and reduced at once: on a CPU, few enough to stay in a core's own cache meanwhile.
_CPU_TILE_BYTES, _TILE_BYTES = 2**20, 16 * 2**20
# Columns a group in `largest`: the cost is flat from 32 to 128.
_GROUP = 64


@dataclass(frozen=True)
class Signals:
    """Signals of consecutive rows, on the CPU."""

    ids_RK: torch.Tensor | None
    """int64, by falling logit; None for candidates, whose ids the student has."""

    logits_RK: torch.Tensor
    """float32; -inf where a candidate id is -1."""

    target_logits_R: torch.Tensor
    """float32: the logit of the token that follows, for each row that has one."""

    logsumexp_RM: torch.Tensor
    """float32: ln Σ_v exp(z_v / T)."""


@dataclass(frozen=True)
class _Reduced:
    """Logits of a few rows, and what was computed of them while they were at hand."""

    logits_RV: torch.Tensor
    maxima_RG: torch.Tensor
    """Of each whole group of `_GROUP` columns."""
    logsumexp_RM: torch.Tensor


def use_bfloat16_products() -> None:
    """Lets float32 products on the CPU take bfloat16 factors, for this process.

    Two to three times faster where the processor has them. Exact here, because the factors of a bfloat16
    teacher are bfloat16 numbers; it would not be for other float32 products of the same process.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]


class SignalHead:
    """The teacher's unembedding on a device, and what is computed with it. Safe to use from several threads.

    Args:
        unembedding: the matrix and what follows it.
        device: where to compute.
        chunk_bytes: float32 logits computed at once by one thread; at least one row is.

    """

    def __init__(
        self, unembedding: Unembedding, *, device: torch.device | str, chunk_bytes: int = CHUNK_LOGITS_BYTES
    ) -> None:
        self.unembedding = unembedding
        self.vocabulary_size, self.hidden_size = unembedding.weight_VD.shape
        self._device = torch.device(device)
        # torch has no product of bfloat16 factors with a float32 result on a CPU; `use_bfloat16_products` is the way.
        self._dtype = torch.float32 if self._device.type == "cpu" else unembedding.weight_VD.dtype
        self._weight_VD = unembedding.weight_VD.to(self._device, self._dtype)
        self._bias_V = None if unembedding.bias_V is None else unembedding.bias_V.to(self._device)
        self._chunk_rows = max(1, chunk_bytes // (4 * self.vocabulary_size))
        self._of_thread = threading.local()

    @torch.inference_mode()
    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 [R, V]: raw logits, after the model's own scale and softcap."""
        return self._logits_of(slice(None), hidden_RD.to(self._device, self._dtype))

    def topk(
        self, hidden_RD: torch.Tensor, target_ids: Sequence[int], *, k: int, temperatures: Sequence[float]
    ) -> Signals:
        """The k largest logits of each row.

        Args:
            hidden_RD: hidden states of consecutive positions.
            target_ids: the token that follows each row; one fewer than rows at the end of a sequence.
            k: 1 … vocabulary_size.
            temperatures: each > 0.

        """
        parts = []
        for rows, reduced in self._chunks(hidden_RD, temperatures):
            logits_RK, ids_RK = largest(reduced.logits_RV, reduced.maxima_RG, k)
            parts.append(self._signals(ids_RK, logits_RK, reduced, target_ids[rows]))
        return _joined(parts)

    def candidates(
        self,
        hidden_RD: torch.Tensor,
        target_ids: Sequence[int],
        *,
        candidate_ids_RC: torch.Tensor,
        temperatures: Sequence[float],
    ) -> Signals:
        """Logits at given ids, int64 [R, C] padded with -1; the rest as in `topk`."""
        parts = []
        for rows, reduced in self._chunks(hidden_RD, temperatures):
            ids_RC = candidate_ids_RC[rows].to(self._device)
            logits_RC = reduced.logits_RV.gather(1, ids_RC.clamp(min=0)).masked_fill_(ids_RC < 0, -torch.inf)
            parts.append(self._signals(None, logits_RC, reduced, target_ids[rows]))
        return _joined(parts)

    @torch.inference_mode()
    def _chunks(self, hidden_RD: torch.Tensor, temperatures: Sequence[float]) -> Iterator[tuple[slice, _Reduced]]:
        """Rows and what they come to, as many at a time as the memory allows.

        Logits are computed tile by tile, and a tile is reduced at once while it is in the core's cache: 350 µs a row
        instead of 634 for one product over the whole vocabulary (docs/teacher.md). One pass over the matrix turns it
        into bfloat16 first, which is why a chunk should have 256 rows: of 128, each pays 340 µs for what costs 200.
        """
        if not hasattr(self._of_thread, "buffer_RV"):  # memory taken anew each time would cost as much as the product
            self._of_thread.buffer_RV = torch.empty(self._chunk_rows, self.vocabulary_size, device=self._device)
        tile_bytes = _CPU_TILE_BYTES if self._device.type == "cpu" else _TILE_BYTES
        for start in range(0, len(hidden_RD), self._chunk_rows):
            rows = slice(start, start + self._chunk_rows)
            chunk_RD = hidden_RD[rows].to(self._device, self._dtype)
            logits_RV = self._of_thread.buffer_RV[: len(chunk_RD)]
            tile = max(1, tile_bytes // (4 * _GROUP * len(chunk_RD))) * _GROUP  # columns: whole groups
            maxima, logsumexp = [], []
            for column in range(0, self.vocabulary_size, tile):
                tile_RV = self._logits_of(slice(column, column + tile), chunk_RD)
                logits_RV[:, column : column + tile] = tile_RV
                maxima.append(group_maxima(tile_RV))
                at_T = [torch.logsumexp(tile_RV if T == 1 else tile_RV / T, dim=1) for T in temperatures]
                logsumexp.append(torch.stack(at_T, dim=1))
            yield rows, _Reduced(logits_RV, torch.cat(maxima, dim=1), torch.stack(logsumexp).logsumexp(0))

    def _logits_of(self, columns: slice, hidden_RD: torch.Tensor) -> torch.Tensor:
        """float32 logits of some columns; their number stands for V here."""
        weight_DV = self._weight_VD[columns].T
        if self._device.type == "cpu":
            logits_RV = hidden_RD @ weight_DV
        else:
            logits_RV = torch.mm(hidden_RD, weight_DV, out_dtype=torch.float32)
        if self._bias_V is not None:
            logits_RV += self._bias_V[columns]
        if self.unembedding.scale != 1.0:
            logits_RV *= self.unembedding.scale
        if self.unembedding.softcap > 0:
            logits_RV.div_(self.unembedding.softcap).tanh_().mul_(self.unembedding.softcap)
        return logits_RV

    def _signals(
        self, ids_RK: torch.Tensor | None, logits_RK: torch.Tensor, reduced: _Reduced, target_ids: Sequence[int]
    ) -> Signals:
        targets_R = torch.tensor(target_ids, dtype=torch.int64, device=self._device)
        return Signals(
            None if ids_RK is None else ids_RK.cpu(),
            logits_RK.cpu(),
            reduced.logits_RV[: len(targets_R)].gather(1, targets_R[:, None]).squeeze(1).cpu(),
            reduced.logsumexp_RM.cpu(),
        )


def row_lengths(
    logits_RK: torch.Tensor, logsumexp_R: torch.Tensor, *, temperature: float, min_mass: float
) -> torch.Tensor:
    """How many of the largest logits have a mass of `min_mass` together, int32 [R]: 1 … K.

    Args:
        logits_RK: by falling logit.
        logsumexp_R: over the vocabulary, at the temperature.
        temperature: at which mass is measured.
        min_mass: in (0, 1]; K where all K have less.

    """
    mass_RK = (logits_RK / temperature - logsumexp_R[:, None]).exp().cumsum(dim=1)
    return ((mass_RK < min_mass).sum(dim=1, dtype=torch.int32) + 1).clamp(max=logits_RK.shape[1])


def group_maxima(logits_RV: torch.Tensor) -> torch.Tensor:
    """The largest of each whole group of columns: [R, V // group]."""
    rows, columns = logits_RV.shape
    groups = columns // _GROUP
    return logits_RV[:, : groups * _GROUP].view(rows, groups, _GROUP).amax(dim=2)


@torch.inference_mode()
def largest(logits_RV: torch.Tensor, maxima_RG: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch.topk(logits_RV, k)`, twice as fast for small k.

    The k largest values lie in the k groups of columns with the largest maxima (or in the remainder):
    were one outside, each of those k groups would hold a value at least as large.

    Args:
        logits_RV: of a few rows.
        maxima_RG: their `group_maxima`.
        k: 1 … V.

    """
    rows, groups = maxima_RG.shape
    if k * 2 > groups:
        values, ids = logits_RV.topk(k)
        return values, ids
    grouped = logits_RV[:, : groups * _GROUP].view(rows, groups, _GROUP)
    chosen = maxima_RG.topk(k, sorted=False).indices
    inside = grouped[torch.arange(rows, device=chosen.device)[:, None], chosen].flatten(1)
    # Indices of this are those of the chosen groups' columns one after the other, then of the remainder.
    values, index = torch.cat([inside, logits_RV[:, groups * _GROUP :]], dim=1).topk(k)
    group = chosen.gather(1, (index // _GROUP).clamp(max=k - 1))
    ids = torch.where(index < k * _GROUP, group * _GROUP + index % _GROUP, index + (groups - k) * _GROUP)
    return values, ids


def _joined(parts: list[Signals]) -> Signals:
    ids = [part.ids_RK for part in parts if part.ids_RK is not None]
    return Signals(
        torch.cat(ids) if ids else None,
        torch.cat([part.logits_RK for part in parts]),
        torch.cat([part.target_logits_R for part in parts]),
        torch.cat([part.logsumexp_RM for part in parts]),
    )
