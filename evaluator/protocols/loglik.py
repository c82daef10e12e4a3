"""Protocol `loglik`: the most likely choice, scored as lm-evaluation-harness 0.4 scores `multiple_choice` tasks.

`acc` takes the choice with the greatest sum of log-probabilities, `acc_norm` the one with the greatest sum per
character. Context and continuation are tokenized together and split at the length of the tokenized context;
spaces at the end of a context go to the continuation; a context that does not fit is cut on its left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.data.tokens import beginning_ids
from tutelage.errors import InvalidRequest
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine, ScoringGroup
from tutelage.evaluator.protocols.base import JoinSpanned, text_hash
from tutelage.evaluator.tasks.base import Choices, Item, Task

METRIC = "acc"
TEMPLATE = "lm_eval"


@dataclass(frozen=True)
class Question:
    """An item as this model scores it: one group for each distinct context, in order of the choices."""

    item: Item
    seed: int
    choices: Choices
    groups: tuple[ScoringGroup, ...]
    prompt_hash: str
    past_join: bool
    """Whether a token spans the end of a context and the beginning of a choice, whose rest alone is scored."""

    @property
    def tokens(self) -> int:
        """By which items of like length share a batch."""
        return sum(
            len(group.context) + sum(len(continuation) for continuation in group.continuations) for group in self.groups
        )


def seeds_of(seed: int) -> tuple[int, ...]:
    """One answer an item, by the evaluation's seed."""
    return (seed,)


def template_of(settings: EvaluationSettings) -> str:
    """Name of the prompt template."""
    return TEMPLATE


def split_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int], bool]:
    """Token ids of a context and of its continuation (`TemplateLM._encode_pair` of lm-evaluation-harness).

    The third value says whether a token spans both: then the harness gives the context alone as its own tokens, and
    scores the tokens after the spanning one.

    Raises:
        InvalidRequest: the context is empty.
        JoinSpanned: the continuation has no token of its own.

    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not kept:
        raise InvalidRequest("the context is empty")
    context_ids = beginning_ids(tokenizer, kept)
    both_ids = beginning_ids(tokenizer, kept + continuation)
    continuation_ids = both_ids[len(context_ids) :]
    if not continuation_ids:
        raise JoinSpanned(f"{continuation!r} has no token of its own after its context")
    return context_ids, continuation_ids, both_ids[: len(context_ids)] != context_ids


def prepare(task: Task, item: Item, engine: Engine, settings: EvaluationSettings, seed: int = 0) -> Question:
    """The item's choices as token ids.

    Raises:
        InvalidRequest: a choice cannot be scored.
        JoinSpanned: a choice has no token of its own.

    """
    assert task.choices is not None
    choices = task.choices(item)
    if 0 in choices.lengths:
        number = choices.lengths.index(0) + 1
        raise InvalidRequest(f"choice {number} of {len(choices.lengths)} is empty; nothing of it can be scored")
    grouped: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
    past_join = False
    for context, continuation in zip(choices.contexts, choices.continuations, strict=True):
        context_ids, continuation_ids, spanned = split_pair(engine.tokenizer, context, continuation)
        past_join |= spanned
        # The last token of a continuation is predicted and never read.
        room = engine.max_tokens + 1 - len(continuation_ids)
        if room < 1:
            raise InvalidRequest(f"a choice has {len(continuation_ids)} tokens; the model reads {engine.max_tokens}")
        key = tuple(context_ids[-room:])
        # Neighbours alone are grouped: choices stay in their order, and only winogrande has several contexts.
        if not grouped or grouped[-1][0] != key:
            grouped.append((key, []))
        grouped[-1][1].append(tuple(continuation_ids))
    groups = tuple(ScoringGroup(context_ids, tuple(continuations)) for context_ids, continuations in grouped)
    text = repr((choices.contexts, choices.continuations))
    return Question(item, seed, choices, groups, text_hash(text), past_join)


def answer(
    task: Task, questions: Sequence[Question], engine: Engine, settings: EvaluationSettings
) -> list[dict[str, Any]]:
    """What of the rows this protocol knows, one a question."""
    scores = iter(engine.loglikelihood([group for question in questions for group in question.groups]))
    rows = []
    for question in questions:
        choices = question.choices
        logps = [logp for _ in question.groups for logp in next(scores)]
        per_character = [logp / length for logp, length in zip(logps, choices.lengths, strict=True)]
        best, best_normalized = _argmax(logps), _argmax(per_character)
        rows.append(
            {
                "output": choices.continuations[best].strip(),
                "extracted": choices.labels[best],
                "extracted_normalized": choices.labels[best_normalized],
                "score": float(best == choices.gold),
                "score_normalized": float(best_normalized == choices.gold),
                "choices_logp": logps,
                "prompt_tokens": sum(len(group.context) for group in question.groups),
                "output_tokens": sum(len(one) for group in question.groups for one in group.continuations),
                "finish_reason": "scored_past_join" if question.past_join else "scored",
            }
        )
    return rows


def _argmax(values: Sequence[float]) -> int:
    """Index of the greatest value, the first of equals."""
    # As numpy's argmax, which the harness uses.
    return max(range(len(values)), key=values.__getitem__)
