"""Continuations and their contexts packed into one row: each context once, each continuation beside the others.

A pack is a forest: groups stand one after the other, and in a group the continuations branch off the context's end.
What may see what is in `group` and `branch`, which the attention mask is made of.
"""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.evaluator.models.base import ScoringGroup


class Layout:
    """Where each token of a pack stands; the last token of a continuation is a target but no input.

    Attributes:
        ids: input token ids, T of them.
        positions: position id of each input; they start anew with each group, and each continuation's follow
            its context's.
        group: number of each input's group.
        branch: 0 in a context; the continuations of a group are counted from 1.
        predictors: for each target, the index of the input whose logits predict it.
        targets: tokens of all continuations, in order.
        lengths: tokens of each continuation.

    """

    def __init__(self, groups: Sequence[ScoringGroup]) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.group: list[int] = []
        self.branch: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.lengths: list[int] = []
        for number, group in enumerate(groups):
            self._append(group.context, 0, number, 0)
            end_of_context = len(self.ids) - 1
            for branch, continuation in enumerate(group.continuations, start=1):
                first = len(self.ids)
                # The last token predicts nothing that is scored.
                self._append(continuation[:-1], len(group.context), number, branch)
                self.predictors += [end_of_context, *range(first, len(self.ids))]
                self.targets += continuation
                self.lengths.append(len(continuation))

    def _append(self, ids: Sequence[int], position: int, group: int, branch: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.group += [group] * len(ids)
        self.branch += [branch] * len(ids)


def packs(groups: Sequence[ScoringGroup], limit: int) -> list[list[ScoringGroup]]:
    """Groups in order, cut so that a pack has at most `limit` tokens (a larger group is a pack of its own)."""
    cut: list[list[ScoringGroup]] = []
    room = 0
    for group in groups:
        size = len(group.context) + sum(len(continuation) - 1 for continuation in group.continuations)
        if not cut or size > room:
            cut.append([])
            room = limit
        cut[-1].append(group)
        room -= size
    return cut
