"""What is scored while it is written: the rows of the whole sequence, no token twice, one call at a time."""

from __future__ import annotations

import random
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tutelage.errors import Unreachable
from tutelage.trainer.data.sequences import TokenSequence, token_sequence
from tutelage.trainer.teacher.base import SignalSpec, TeacherIdentity
from tutelage.trainer.teacher.several import SeveralTeachers
from tutelage.trainer.teacher.streamed import StreamedScoring

BLOCK = 8
HIDDEN, TOPK = SignalSpec("hidden"), SignalSpec("topk", k=2, temperatures=(1.0,))


class Teacher:
    """Says about a position what only depends on the tokens up to it, its target, and whose teacher it is."""

    waited_seconds = 0.0

    def __init__(self, block_tokens=BLOCK, seed=0, seconds=0.0):
        self.identity = TeacherIdentity("t", f"{seed}", 1000, 4, 0.0, block_tokens=block_tokens)
        self.calls, self._seed, self._seconds, self._busy = [], seed, seconds, threading.Lock()

    def score(self, sequences, spec):
        assert self._busy.acquire(blocking=False), "two calls at a time"
        self.calls.append(list(sequences))
        time.sleep(self._seconds)
        answers = [self._rows(sequence, spec) for sequence in sequences]
        self._busy.release()
        return answers

    def _rows(self, sequence, spec):
        assert 0 <= sequence.start < sequence.end <= len(sequence.ids)
        positions = range(sequence.start, sequence.end)
        digests = [zlib.crc32(sequence.ids[: t + 1].tobytes(), self._seed) for t in positions]
        if spec.kind == "hidden":
            return {"hidden_RD": np.array([[digest & 0x7FFF] * 4 for digest in digests], np.uint16)}
        following = sequence.ids[sequence.start + 1 : sequence.end + 1]
        return {
            "ids_RK": np.array([[digest % 900] * 2 for digest in digests], np.int32),
            "logits_RK": np.array([[digest % 77] * 2 for digest in digests], np.float32),
            "logsumexp_RM": np.array([[digest % 99] for digest in digests], np.float32),
            "target_logits": np.array([int(token) + 0.5 for token in following], np.float32),
        }


def same_rows(found, expected):
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows, err_msg=name)


def written(generator, tokens):
    return np.array([generator.randrange(900) for _ in range(tokens)], np.int32)


def prompt_of(sequence, start=None):
    tokens = sequence.prompt_tokens
    return TokenSequence(
        sequence.ids[:tokens],
        start=tokens - 1 if start is None else start,
        end=tokens,
        prompt_tokens=tokens,
        teacher=sequence.teacher,
        teacher_prompt_ids=sequence.teacher_prompt_ids,
    )


def told_in_pieces(scoring, sequences, generator):
    """Tells each completion a few tokens at a time, as threads would."""
    left = dict.fromkeys(sequences, 0)
    while left:
        index = generator.choice(list(left))
        sequence = sequences[index]
        left[index] = min(sequence.completion_tokens, left[index] + generator.randrange(1, 12))
        over = left[index] == sequence.completion_tokens
        scoring.piece(index, sequence.ids[sequence.prompt_tokens :][: left[index]], over=over)
        if over:
            del left[index]
        time.sleep(generator.random() * 1e-3)


@pytest.fixture
def background():
    with ThreadPoolExecutor(1) as thread:
        yield thread


@pytest.mark.parametrize("spec", [HIDDEN, TOPK], ids=["hidden", "topk"])
@pytest.mark.parametrize("seed", range(4))
def test_the_rows_are_those_of_the_whole_sequences(seed, spec, background):
    """Of several teachers, of whom one reuses nothing; with prompts of the teacher's own, and with masks."""
    generator = random.Random(seed)
    sequences = {}
    for index in range(6):
        prompt, completion = written(generator, generator.choice([1, 7, 8, 30])), written(generator, 1 + index * 11)
        mask = None
        if index == 4:  # A tool wrote the beginning and the end.
            mask = np.arange(len(prompt) + len(completion)) >= len(prompt) + 3
            mask[-2:] = False
        sequences[index] = token_sequence(
            prompt,
            completion,
            loss_on_prompt=False,
            loss_on_last_token=spec is HIDDEN and index == 3,
            mask=mask,
            teacher="plain" if index == 5 else None,
            teacher_prompt_ids=written(generator, 21) if index == 2 else None,
        )
    members = {None: Teacher(seconds=seed * 2e-3), "plain": Teacher(block_tokens=0, seed=1)}
    scoring = StreamedScoring(SeveralTeachers(members), spec, background)
    scoring.begin({index: prompt_of(sequence) for index, sequence in sequences.items()})
    told_in_pieces(scoring, sequences, generator)
    found = scoring.finish(sequences).result()
    assert len(members[None].calls) > 2
    assert [len(call) for call in members["plain"].calls] == [1]
    for index, sequence in sequences.items():
        same_rows(found[index], Teacher(seed=index == 5).score([sequence.for_teacher], spec)[0])


def test_no_token_is_asked_for_twice_and_prompts_are_read_ahead_once(background):
    generator, teacher = random.Random(7), Teacher()
    prompt = written(generator, 21)
    sequences = {
        index: token_sequence(prompt, written(generator, 50 + index), loss_on_prompt=False) for index in range(3)
    }
    scoring = StreamedScoring(teacher, HIDDEN, background)
    scoring.begin({index: prompt_of(sequence) for index, sequence in sequences.items()})
    while not teacher.calls:
        time.sleep(1e-3)
    told_in_pieces(scoring, sequences, generator)
    scoring.finish(sequences).result()
    (ahead,) = teacher.calls[0]
    assert (ahead.ids.tolist(), ahead.start, ahead.end) == (prompt.tolist(), 15, 16)
    for sequence in sequences.values():
        pieces = [
            piece
            for call in teacher.calls[1:]
            for piece in call
            if len(piece.ids) > 21 and np.array_equal(piece.ids, sequence.ids[: len(piece.ids)])
        ]
        assert [piece.start for piece in pieces] == [20, *(piece.end for piece in pieces[:-1])]
        assert all(piece.end % BLOCK == 0 and len(piece.ids) == piece.end + 1 for piece in pieces[:-1])
        assert pieces[-1].end == len(sequence.ids) - 1


def test_a_sequence_that_has_ended_is_scored_to_its_end_while_others_are_written(background):
    generator, teacher = random.Random(9), Teacher()
    ends, goes_on = (
        token_sequence(written(generator, 10), written(generator, tokens), loss_on_prompt=False) for tokens in (19, 40)
    )
    scoring = StreamedScoring(teacher, HIDDEN, background)
    scoring.begin({0: prompt_of(ends), 1: prompt_of(goes_on)})
    scoring.piece(0, ends.ids[10:], over=True)
    scoring.piece(1, goes_on.ids[10:20], over=False)
    deadline = time.monotonic() + 60
    while not {28, 16} <= {piece.end for call in teacher.calls for piece in call}:  # its end, and a block of the other
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    before = len(teacher.calls)
    answers = scoring.finish({0: ends, 1: goes_on}).result()
    assert [piece.start for call in teacher.calls[before:] for piece in call] == [16]
    for index, sequence in enumerate((ends, goes_on)):
        same_rows(answers[index], Teacher().score([sequence], HIDDEN)[0])


def test_a_slow_teacher_is_asked_for_longer_pieces_and_never_twice_at_once(background):
    generator, teacher = random.Random(3), Teacher(seconds=0.02)
    sequences = {
        index: token_sequence(written(generator, 9), written(generator, 300), loss_on_prompt=False)
        for index in range(2)
    }
    scoring = StreamedScoring(teacher, HIDDEN, background)
    scoring.begin({index: prompt_of(sequence) for index, sequence in sequences.items()})
    told_in_pieces(scoring, sequences, generator)
    scoring.finish(sequences).result()
    assert 3 <= len(teacher.calls) < 300 // BLOCK
    assert all(len(call) <= 2 for call in teacher.calls)


def test_with_a_loss_on_the_prompt_its_rows_are_the_first_piece(background):
    generator, teacher = random.Random(5), Teacher()
    sequence = token_sequence(written(generator, 20), written(generator, 30), loss_on_prompt=True)
    scoring = StreamedScoring(teacher, TOPK, background)
    scoring.begin({4: prompt_of(sequence, start=0)})
    while not teacher.calls:
        time.sleep(1e-3)
    told_in_pieces(scoring, {4: sequence}, generator)
    found = scoring.finish({4: sequence}).result()
    assert (teacher.calls[0][0].start, teacher.calls[0][0].end) == (0, 16)
    same_rows(found[4], Teacher().score([sequence], TOPK)[0])


def test_what_was_taken_back_is_scored_anew(background):
    """A function that writes with the student may drop the end of what the student wrote."""
    generator, teacher = random.Random(6), Teacher()
    kept, dropped, prompt = written(generator, 20), written(generator, 30), written(generator, 10)
    sequence = token_sequence(prompt, np.concatenate([kept, written(generator, 25)]), loss_on_prompt=False)
    for told in ([dropped], [np.concatenate([kept, dropped]), sequence.ids[10:40]]):
        scoring = StreamedScoring(teacher, HIDDEN, background)
        scoring.begin({0: prompt_of(sequence)})
        for ids in told:
            scoring.piece(0, ids, over=False)
            time.sleep(0.02)
        same_rows(scoring.finish({0: sequence}).result()[0], Teacher().score([sequence], HIDDEN)[0])


def test_what_a_piece_raises_is_raised_where_the_rows_are_asked_for(background, monkeypatch):
    generator, teacher = random.Random(8), Teacher()
    sequence = token_sequence(written(generator, 10), written(generator, 30), loss_on_prompt=False)
    monkeypatch.setattr(teacher, "score", lambda *_: (_ for _ in ()).throw(Unreachable("waited 60 s")))
    scoring = StreamedScoring(teacher, HIDDEN, background)
    scoring.begin({0: prompt_of(sequence)})
    scoring.piece(0, sequence.ids[10:], over=True)
    answers = scoring.finish({0: sequence})
    with pytest.raises(Unreachable, match="waited 60 s"):
        answers.result()
