"""The first real requests of a teacher: they must be finite, and they measure its noise floor.

The same tokens computed alone and in a batch give slightly different logits, because sums are split
differently. A student whose KL to the teacher is below that difference has nothing left to learn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from tutelage.errors import TutelageError
from tutelage.teacher.v1 import teacher_pb2 as pb

from teacher_server.signal_head import SignalHead, normalized
from teacher_server.teacher import ScoringParts, Teacher

_SEED = 0
_LENGTHS = (8, 32, 64, 152)


def check_sequences(vocabulary_size: int, longest: int) -> list[list[int]]:
    """Sequences of several lengths whose ids cover the vocabulary, both ends included."""
    generator = torch.Generator().manual_seed(_SEED)
    sequences = [
        torch.randint(vocabulary_size, (min(length, longest),), generator=generator).tolist() for length in _LENGTHS
    ]
    sequences[-1][0], sequences[-1][-1] = 0, vocabulary_size - 1
    return sequences


async def check_scoring(scoring: ScoringParts, longest: int) -> pb.NoiseFloor:
    """Scores sequences alone, then all at once, and compares.

    Raises:
        TutelageError: log-probabilities are not finite.

    """
    sequences = check_sequences(scoring.head.vocabulary_size, longest)
    alone = [await scoring.engine.hidden_states(sequence) for sequence in sequences]
    batched = await asyncio.gather(*map(scoring.engine.hidden_states, sequences))
    kl = await asyncio.to_thread(_kl_between, alone, batched, scoring.head)
    if not torch.isfinite(kl).all():
        raise TutelageError("the teacher's log-probabilities are not finite; its weights or its dtype are broken")
    return pb.NoiseFloor(mean_kl=kl.mean().item(), max_kl=kl.max().item(), positions=len(kl))


def _kl_between(alone: Sequence[torch.Tensor], batched: Sequence[torch.Tensor], head: SignalHead) -> torch.Tensor:
    """KL(alone ‖ batched) of each position, nats."""
    parts = []
    for one, other in zip(alone, batched, strict=True):
        p_logp, q_logp = normalized(one, head).double(), normalized(other, head).double()
        parts.append((p_logp.exp() * (p_logp - q_logp)).sum(dim=1))
    return torch.cat(parts)


async def check_writing(teacher: Teacher) -> None:
    """Writes one token."""
    from teacher_server.engine import Sampling

    assert teacher.writing is not None
    one_token = Sampling(samples=1, max_new_tokens=1, temperature=0.0, top_p=1.0, seed=0, stop=())
    async for _ in teacher.writing.write([0], one_token):
        pass
