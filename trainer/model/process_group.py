"""The workers that train one student together: which of them this process is, and what they add up.

Each has the whole student and takes its share of every step's sequences. What is divided by, rows above all, is counted
over all workers before the loss, so gradients are summed, not averaged, in float32, once a step; then every worker
takes the same step with the same weights. (`DistributedDataParallel` averages per worker, in the model's dtype.)
The first worker decides what depends on more than its share, and is the only one that writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Workers:
    """One of `count` workers that call the same methods in the same order; alone, none of them communicates.

    Between several is torch's default process group.
    """

    rank: int = 0
    """Which one this is: 0 … count − 1."""
    count: int = 1
    """How many there are."""
    device: str = "cpu"
    """Where the process group wants its tensors."""

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the one that decides and writes."""
        return self.rank == 0

    def share(self, items: Sequence[ItemT]) -> Sequence[ItemT]:
        """What this worker gets of items that are dealt out one by one."""
        return items[self.rank :: self.count]

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the workers, one for each value; integers below 2⁵³ exactly."""
        if self.alone:
            return list(values)
        # One collective for counts and losses alike: float64 has both exactly enough.
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def largest(self, value: int) -> int:
        """The largest of what the workers give."""
        if self.alone:
            return value
        found = torch.tensor([value], device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found.item())

    def of_first(self, value: int) -> int:
        """What the first worker gave; the others' values do not matter."""
        if self.alone:
            return value
        decided = torch.tensor([value], device=self.device)
        dist.broadcast(decided, src=0)
        return int(decided.item())

    def sum_gradients(self, weights: Sequence[Tensor]) -> None:
        """Replaces each weight's gradient by the sum over the workers; where none has one, there stays none."""
        if self.alone:
            return
        # An expert that no token of a share was sent to has no gradient there.
        # All workers must issue the same collectives in the same order, or they wait for each other for ever.
        holders = self.total([weight.grad is not None for weight in weights])
        pending = []
        for weight, held in zip(weights, holders, strict=True):
            if held:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                pending.append(dist.all_reduce(weight.grad, async_op=True))
        for work in pending:
            work.wait()


ALONE = Workers()
"""A student's only worker."""


def workers_of_process_group() -> Workers:
    """Who this process is in torch's default process group, which must be there."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return Workers(dist.get_rank(), dist.get_world_size(), device)
