"""Has the sequences of a batch scored while they are written.

    scoring = StreamedScoring(teacher, spec, background)
    scoring.begin({0: prompt, 1: prompt})          # which the teacher reads ahead
    scoring.piece(0, [17, 4, 9, …], over=False)   # in whatever thread writes, whenever there is more
    rows = scoring.finish({0: sequence, …})        # as if the whole sequences had been asked for at once

A sequence that has grown is asked for again, longer, from where its last piece ended; what came before, the teacher
reads from its prefix cache. Pieces end where blocks of that cache do, so that no token is computed twice, or where the
sequence does. One call is under way at a time, with one piece of each sequence that has a whole block more; what is
written meanwhile makes the next one longer. So no more than the batch itself ever waits, however slow the teacher is.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace

import numpy as np

from tutelage.trainer.data.sequences import TokenIds, TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, Teacher
from tutelage.trainer.teacher.frame_decoder import joined
from tutelage.trainer.teacher.several import members_of


class StreamedScoring:
    """The scoring of one batch.

    Args:
        teacher: who scores; a member of it that reuses no prefixes is asked for whole sequences.
        spec: which signal; not `candidates`, whose ids are chosen when all is written.
        background: runs one call after the other, in the order in which they were submitted.

    """

    def __init__(self, teacher: Teacher, spec: SignalSpec, background: Executor) -> None:
        self._teacher, self._spec, self._background = teacher, spec, background
        self._growing: dict[int, _Growing] = {}
        self._lock = threading.Lock()
        self._calls: list[Future[None]] = []
        self._call_waits = False
        """Whether the last call has not begun, and will take with it whatever comes till then."""
        self._finished = False

    def begin(self, prompts: Mapping[int, TokenSequence]) -> None:
        """Sequences will be written after these prompts, and told by `piece`.

        Args:
            prompts: by index, without completions, scored from the first position that is wanted.

        """
        members = members_of(self._teacher)
        for index, prompt in prompts.items():
            block_tokens = members[prompt.teacher].identity.block_tokens
            if block_tokens:
                self._growing[index] = _Growing(prompt.for_teacher, block_tokens)
        with self._lock:
            self._call()

    def piece(self, index: int, completion_ids: TokenIds, *, over: bool) -> None:
        """All that is written of a completion so far, and whether no more is to be expected soon; returns at once."""
        growing = self._growing.get(index)
        if growing is None:
            return
        with self._lock:
            growing.grow(completion_ids, over)
            if growing.has_more:
                self._call()

    def finish(self, sequences: Mapping[int, TokenSequence]) -> Future[dict[int, SignalArrays]]:
        """What the teacher says about whole sequences, by index; raises what its `score` raised, for a piece or now."""
        with self._lock:
            self._finished = True
            return self._background.submit(self._answers, sequences)

    def _call(self) -> None:
        if self._growing and not self._call_waits and not self._finished:
            self._call_waits = True
            self._calls.append(self._background.submit(self._score_pieces))

    def _score_pieces(self) -> None:
        # Completions of one prompt have it read ahead once.
        wanted: dict[tuple[str | None, int, bytes], tuple[TokenSequence, list[_Growing]]] = {}
        with self._lock:
            self._call_waits = False
            if self._finished:
                return
            for growing in self._growing.values():
                piece = growing.next_piece()
                if piece is not None:
                    key = piece.teacher, piece.start, piece.ids.tobytes()
                    wanted.setdefault(key, (piece, []))[1].append(growing)
        if not wanted:
            return
        answers = self._teacher.score([piece for piece, _ in wanted.values()], self._spec)
        with self._lock:
            for (piece, those), answer in zip(wanted.values(), answers, strict=True):
                for growing in those:
                    growing.add(piece, answer)

    def _answers(self, sequences: Mapping[int, TokenSequence]) -> dict[int, SignalArrays]:
        for call in self._calls:  # All are done: they ran before, in the same thread.
            call.result()
        parts: dict[int, list[SignalArrays]] = {}
        rest: dict[int, TokenSequence] = {}
        for index, sequence in sequences.items():
            whole, growing = sequence.for_teacher, self._growing.get(index)
            parts[index], start = growing.rows_of(whole) if growing else ([], whole.start)
            if start < whole.end:
                rest[index] = replace(whole, start=start, mask=None)
        for index, answer in zip(rest, self._teacher.score(list(rest.values()), self._spec), strict=True):
            parts[index].append(answer)
        return {index: joined(those) for index, those in parts.items()}


@dataclass
class _Growing:
    """A sequence that is being written, as the teacher reads it."""

    prompt: TokenSequence
    block_tokens: int
    ids: TokenIds = field(init=False)
    """All that is known of it."""
    scored: int = field(init=False)
    """One past the last position whose row is there."""
    parts: list[SignalArrays] = field(default_factory=list)
    """The rows from the prompt's `start` to `scored`."""
    read_ahead: bool = False
    """Whether the teacher was asked to read the prompt."""
    over: bool = False
    """Whether it is not worth while to wait for a whole block."""

    def __post_init__(self) -> None:
        self.ids, self.scored = self.prompt.ids, self.prompt.start

    def grow(self, completion_ids: TokenIds, over: bool) -> None:
        """All that is written of its completion so far."""
        ids = np.concatenate([self.prompt.ids, completion_ids])
        if self.parts and not _begin_alike(ids, self.ids, self.scored + 1):
            # A function that writes with the student took back what it had written.
            self.parts, self.scored = [], self.prompt.start
        self.ids, self.over = ids, over

    @property
    def _end(self) -> int:
        """Up to where it can be scored now; the token after that, the target of the last row, is known."""
        last = len(self.ids) - 1
        return last if self.over else last // self.block_tokens * self.block_tokens

    @property
    def has_more(self) -> bool:
        """Whether there is something to be scored."""
        return self._end > self.scored

    def next_piece(self) -> TokenSequence | None:
        """What to ask for, if there is a whole block more; the first time, at least to read the prompt."""
        before, self.read_ahead = self.read_ahead, True
        if self.has_more:
            return replace(self.prompt, ids=self.ids[: self._end + 1], start=self.scored, end=self._end)
        if before or not self._end:
            return None
        return replace(self.prompt, start=self._end - 1, end=self._end)  # A row that nobody wants; none is no request.

    def add(self, piece: TokenSequence, answer: SignalArrays) -> None:
        """Keeps the rows of a piece, if they are still those of the sequence."""
        if piece.start == self.scored and _begin_alike(piece.ids, self.ids, len(piece.ids)):
            self.parts.append(answer)
            self.scored = piece.end

    def rows_of(self, whole: TokenSequence) -> tuple[list[SignalArrays], int]:
        """The rows of the finished sequence that are there, and the position after them."""
        first, end = self.prompt.start, min(self.scored, whole.end)
        if not first <= whole.start < end or not _begin_alike(whole.ids, self.ids, end + 1):
            return [], whole.start
        rows = slice(whole.start - first, end - first)
        return [{name: array[rows] for name, array in joined(self.parts).items()}], end


def _begin_alike(ids: TokenIds, others: TokenIds, tokens: int) -> bool:
    return np.array_equal(ids[:tokens], others[:tokens])
