"""Sequences that a student writes together with a function of the user's: tools, an environment, several turns.

    def rollout(row, generate, tokenizer):
        written = generate(row.prompt_ids)          # the student goes on after these token ids
        ...                                         # a tool answers
        return token_ids, mask                      # what follows the prompt; mask: what of it the student wrote

`sampling.rollout: package.module:rollout` names it. Each sequence of a batch has a thread of its own; when all that are
left wait for the student, it writes for all of them at once, so a batch is the same however the threads run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from tutelage.data.dataset_files import TokenizedExample
from tutelage.errors import ConfigurationError
from tutelage.trainer.data.sequences import Completion, TokenIds
from tutelage.trainer.rollout.base import OnPiece, Sampler

Generate = Callable[[Sequence[int]], list[int]]
"""From all token ids so far, the prompt's included, to what the student writes then; empty if there is no room."""
Rollout = Callable[[TokenizedExample, Generate, Any], tuple[Sequence[int], Sequence[bool]]]
"""(row, generate, tokenizer) to the token ids after the row's prompt, and which of them the student wrote."""


def rollout_named(path: str) -> Rollout:
    """The function at `package.module:function`.

    Raises:
        ConfigurationError: it cannot be imported, or is none.

    """
    module, _, name = path.partition(":")
    try:
        found: Rollout = getattr(importlib.import_module(module), name)
    except Exception as error:  # Importing runs the module, which may raise anything.
        raise ConfigurationError(
            f"{path} cannot be imported: {type(error).__name__}: {error}; name a function of a module "
            "that Python finds where the student runs",
            "sampling.rollout",
        ) from error
    if not callable(found):
        raise ConfigurationError(f"{path} is {found!r:.80}, which cannot be called", "sampling.rollout")
    return found


def write_with(
    rollout: Rollout,
    sampler: Sampler,
    *,
    step: int,
    rows: Mapping[int, TokenizedExample],
    tokenizer: Any,
    max_tokens: int,
    on_piece: OnPiece | None = None,
) -> list[Completion]:
    """What the function makes of each row with the student.

    Args:
        rollout: the user's.
        sampler: the student's.
        step: optimizer steps done.
        rows: by index in the step's batch.
        tokenizer: the student's.
        max_tokens: prompt and completion together; what is longer loses its end.
        on_piece: told what follows a row's prompt so far, each time that the student goes on with it.

    Raises:
        ConfigurationError: the function raised, or returned something else than what was written.

    """
    writers = {index: _Writer(rollout, row, tokenizer, max_tokens) for index, row in rows.items()}
    turn = 0
    # Each writer that is left says something: that it is done, or what it wants continued.
    while left := {index: writer.wanted() for index, writer in writers.items() if not writer.done}:
        asked = {index: context for index, context in left.items() if context is not None}
        if asked:
            tell = on_piece and partial(_tell, on_piece, rows, asked)
            written = sampler.write(step, list(asked), list(asked.values()), turn=turn, on_piece=tell).result()
            for index, completion in zip(asked, written, strict=True):
                writers[index].go_on(completion)
            turn += 1
    return [writer.completion() for writer in writers.values()]


def _tell(
    on_piece: OnPiece, rows: Mapping[int, TokenizedExample], contexts: Mapping[int, TokenIds], index: int, ids: TokenIds
) -> None:
    """Tells what follows a row's prompt, if the student goes on with that."""
    prompt, context = rows[index].prompt_ids, contexts[index]
    if np.array_equal(context[: len(prompt)], prompt):
        on_piece(index, np.concatenate([context[len(prompt) :], ids]))


class _Writer:
    """One call of the function, in a thread of its own."""

    def __init__(self, rollout: Rollout, row: TokenizedExample, tokenizer: Any, max_tokens: int) -> None:
        self._row, self._max_tokens = row, max_tokens
        self._questions, self._answers = SimpleQueue[TokenIds | None](), SimpleQueue[Completion]()
        self._parts: list[tuple[TokenIds, Completion]] = []
        """What was continued, and with what."""
        self._outcome: Any = None
        self._vocabulary_size = len(tokenizer)
        self.done = False

        def run() -> None:
            try:
                self._outcome = rollout(row, self._generate, tokenizer)
            except Exception as error:  # Whatever the user's function raises is told by the thread that trains.
                self._outcome = error
            self._questions.put(None)

        Thread(target=run, name="rollout", daemon=True).start()

    def _generate(self, token_ids: Sequence[int]) -> list[int]:
        """In the function's thread: what the student writes after these ids."""
        context = np.asarray(token_ids, np.int32)
        if len(context) >= self._max_tokens:
            return []
        self._questions.put(context)
        completion = self._answers.get()
        self._parts.append((context, completion))
        return [int(token) for token in completion.ids]

    def wanted(self) -> TokenIds | None:
        """What it wants continued; None if the function has returned."""
        question = self._questions.get()
        self.done = question is None
        return question

    def go_on(self, completion: Completion) -> None:
        """Answers what it wanted."""
        self._answers.put(completion)

    def completion(self) -> Completion:
        """What the function returned, checked against what the student wrote."""
        if isinstance(self._outcome, Exception):
            raise _refusal(f"raised {type(self._outcome).__name__}: {self._outcome}") from self._outcome
        try:
            token_ids, mask = self._outcome
            ids, said = np.asarray(token_ids, np.int32), np.asarray(mask, np.bool_)
        except (TypeError, ValueError) as error:
            raise _refusal(f"returned {self._outcome!r:.80}, expected token ids and a mask") from error
        if ids.ndim != 1 or ids.shape != said.shape:
            raise _refusal(f"returned {ids.shape} token ids and a mask of {said.shape}; there is one for each token")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocabulary_size:
            raise _refusal(f"returned ids from {ids.min()} to {ids.max()}; the vocabulary has {self._vocabulary_size}")
        room = self._max_tokens - len(self._row.prompt_ids)
        ids, said = ids[:room], said[:room]
        written, logp = self._drawn(ids)
        if (said & ~written).any():
            at = int(np.flatnonzero(said & ~written)[0])
            raise _refusal(
                f"says that the student wrote token {at} after the prompt ({ids[at]}), which it did not after what "
                "stands before it; leave it out of the mask"
            )
        if not said.any():
            raise _refusal("returned nothing that the student wrote; there is nothing to learn from")
        return Completion(ids, logp, None if said.all() else said)

    def _drawn(self, ids: TokenIds) -> tuple[np.typing.NDArray[np.bool_], np.typing.NDArray[np.float32] | None]:
        """Which of the ids the student drew in this very context, and with what ln p."""
        prompt = len(self._row.prompt_ids)
        whole = np.concatenate([self._row.prompt_ids, ids])
        drawn, logp = np.zeros(len(whole), np.bool_), np.zeros(len(whole), np.float32)
        for context, part in self._parts:
            start, end = len(context), min(len(context) + len(part.ids), len(whole))
            if start >= prompt and np.array_equal(whole[:start], context):
                same = np.cumprod(whole[start:end] == part.ids[: end - start]).astype(np.bool_)
                drawn[start:end] |= same
                if part.logp is not None:
                    logp[start:end][same] = part.logp[: end - start][same]
        asked = all(part.logp is not None for _, part in self._parts)
        return drawn[prompt:], logp[prompt:] if asked else None


def _refusal(problem: str) -> ConfigurationError:
    return ConfigurationError(f"the function {problem}", "sampling.rollout")
