"""How a teacher's raw logits become a distribution: add noise, divide by the temperature, truncate.

p = softmax(truncate((z + σ·ε) / T)). The noise ε is standard normal, drawn per position and vocabulary id by a
counter-based generator: Philox 4x32 with 10 rounds (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011), counter = (id // 4, position, digest), key = run seed. Nothing else enters, so a
token's noise is the same in every batch, chunk, retry, rank and resume.

Shapes: the legend in docs/architecture.md; G groups of four ids, which one call of the generator serves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The constants of Philox 4x32, the same as in the authors' Random123 and in cuRAND.
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class TeacherDistribution:
    """What is done to logits before they are compared."""

    temperature: float = 1.0
    """T of the teacher, > 0."""
    student_temperature: float | None = None
    """T of the student, > 0; None means the teacher's."""
    noise: float = 0.0
    """σ, the standard deviation of the noise on the teacher's raw logits, ≥ 0; 0 draws nothing."""
    noise_seed: int = 0
    """Key of the noise, 0 … 2⁶⁴-1."""
    scale_by_temperature_squared: bool = False
    """Whether the divergence is multiplied by the teacher temperature's square (Hinton, Vinyals, Dean 2015)."""
    top_k: int = 0
    """If > 0: the teacher keeps only its k likeliest ids (after noise)."""
    top_p: float = 1.0
    """If < 1: the teacher keeps only the fewest likeliest ids that together have this mass, in (0, 1]."""

    @property
    def temperature_of_student(self) -> float:
        """T of the student."""
        return self.temperature if self.student_temperature is None else self.student_temperature

    @property
    def truncates(self) -> bool:
        """Whether some of the teacher's ids get probability 0."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def loss_factor(self) -> float:
        """T² if asked for, else 1."""
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0


def teacher_distribution_logits(
    logits_NV: Tensor, sequence_digest_N: Tensor, position_N: Tensor, distribution: TeacherDistribution
) -> Tensor:
    """The logits of the teacher distribution [N, V] (not normalised), from its raw ones, which it may overwrite."""
    if distribution.noise > 0.0:
        noise_NV = counter_normal(distribution.noise_seed, sequence_digest_N, position_N, logits_NV.shape[1])
        logits_NV = logits_NV.add_(noise_NV, alpha=distribution.noise)
    if distribution.temperature != 1.0:
        logits_NV = logits_NV.div_(distribution.temperature)
    if distribution.top_k > 0:
        logits_NV = keep_top_k(logits_NV, distribution.top_k)
    if distribution.top_p < 1.0:
        logits_NV = keep_top_p(logits_NV, distribution.top_p)
    return logits_NV


def keep_top_k(logits_NV: Tensor, k: int) -> Tensor:
    """Logits [N, V] with -inf at all but the k largest of each row; of equal ones the lower id stays."""
    if k >= logits_NV.shape[1]:
        return logits_NV
    # `topk` leaves open which of equal logits it takes; bfloat16 logits are often equal.
    order_NV = logits_NV.argsort(dim=-1, descending=True, stable=True)
    return logits_NV.scatter(-1, order_NV[:, k:], -math.inf)


def keep_top_p(logits_NV: Tensor, p: float) -> Tensor:
    """Logits [N, V] with -inf outside the fewest likeliest ids that have mass p together (Holtzman et al. 2020)."""
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    probability_NV = sorted_NV.softmax(-1)
    mass_before_NV = probability_NV.cumsum(-1) - probability_NV
    return logits_NV.scatter(-1, order_NV, sorted_NV.masked_fill(mass_before_NV >= p, -math.inf))


def counter_normal(seed: int, sequence_digest_N: Tensor, position_N: Tensor, vocabulary_size: int) -> Tensor:
    """Standard normal noise of every vocabulary id, float32 [N, V].

    Args:
        seed: 0 … 2⁶⁴-1.
        sequence_digest_N: int64 [N].
        position_N: int64 [N], 0 … 2³²-1.
        vocabulary_size: V.

    """
    blocks = math.ceil(vocabulary_size / 4)
    group_NG = torch.arange(blocks, device=position_N.device).expand(len(position_N), blocks)
    normal_NG4 = torch.stack(_normals(seed, sequence_digest_N, position_N, group_NG), dim=-1)
    return normal_NG4.flatten(1)[:, :vocabulary_size]


def counter_normal_at(seed: int, sequence_digest_N: Tensor, position_N: Tensor, ids_NK: Tensor) -> Tensor:
    """The same noise as `counter_normal`, at some ids only: float32 [N, K] for ids int64 [N, K], each ≥ 0."""
    normal_NK4 = torch.stack(_normals(seed, sequence_digest_N, position_N, ids_NK // 4), dim=-1)
    return normal_NK4.gather(-1, (ids_NK % 4)[..., None])[..., 0]


def _normals(seed: int, sequence_digest_N: Tensor, position_N: Tensor, group_NG: Tensor) -> list[Tensor]:
    """The four normals of each block of ids, by Box and Muller from the four words of the counter."""
    digest_N1 = sequence_digest_N[:, None]
    counter = (group_NG, position_N[:, None], digest_N1 & _WORD, (digest_N1 >> 32) & _WORD)
    words = [word.expand(group_NG.shape) for word in philox(counter, (seed & _WORD, (seed >> 32) & _WORD))]
    normals = []
    for first, second in ((words[0], words[1]), (words[2], words[3])):
        # (x + ½) / 2³² is in (0, 1], so the logarithm is finite.
        radius = first.float().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = second.float().mul_(2.0 * math.pi * 2.0**-32)
        normals += [angle.cos().mul_(radius), angle.sin_().mul_(radius)]
    return normals


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four words from a counter of four words and a key of two.

    Words are int64 tensors (that broadcast) or integers with values 0 … 2³²-1. A product of two words may wrap
    around in int64, which leaves its 64 bits as they should be.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # torch has no multiplication of uint32 with a high word; int64 products keep both.
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product2 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product2.bitwise_and_(_WORD), product0.bitwise_and_(_WORD)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3
