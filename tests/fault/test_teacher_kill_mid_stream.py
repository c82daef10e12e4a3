"""A teacher that is killed or frozen in the middle of an answer: noticed soon, and the answers are those without it."""

from __future__ import annotations

import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fake_teacher import VOCABULARY_SIZE
from restartable_teacher import restartable_teacher
from tutelage.rpc.transport import CHANNEL_OPTIONS
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.frame_decoder import Answer
from tutelage.trainer.teacher.grpc_client import TeacherClient
from tutelage.trainer.teacher.streamed import StreamedScoring

RNG = np.random.default_rng(0)
REQUESTS = [
    TokenSequence(RNG.integers(0, VOCABULARY_SIZE, length).astype(np.int32), length % 3, length)
    for length in range(100, 400, 25)
]
SPECS = {"hidden": SignalSpec("hidden"), "topk": SignalSpec("topk", k=32, temperatures=(1.0, 2.0))}


@pytest.fixture(scope="module")
def teacher():
    with restartable_teacher() as teacher:
        yield teacher


@pytest.fixture
def outages():
    """When the client began to wait for its teacher."""
    return []


@pytest.fixture
def client(teacher, outages):
    with TeacherClient(
        teacher.address,
        student_id="ann",
        wait_seconds=120,
        tokenizer_digests={},
        waiting=lambda seconds, reason: outages.append((time.monotonic(), reason)),
    ) as client:
        yield client


class AtFrame:
    """Does something once, just before the client takes its n-th frame."""

    def __init__(self, monkeypatch) -> None:
        self.frames, self.number, self.happened_at = 0, -1, 0.0
        add = Answer.add

        def counted(answer, frame) -> None:
            if self.frames == self.number:
                self.happened_at = time.monotonic()
                self.what()
            self.frames += 1
            add(answer, frame)

        monkeypatch.setattr(Answer, "add", counted)

    def arm(self, number: int, what) -> None:
        self.frames, self.number, self.what = 0, number, what


def assert_same(given, expected) -> None:
    for one, other in zip(given, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            assert np.array_equal(one[name], array), name


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_frames_costs_only_time(kills, teacher, client, outages, monkeypatch):
    at_frame, back, expected, frames = AtFrame(monkeypatch), [], {}, {}
    for kind, spec in SPECS.items():
        at_frame.arm(-1, None)
        expected[kind] = client.score(REQUESTS, spec)
        frames[kind] = at_frame.frames
        assert frames[kind] > 3 * len(REQUESTS)

    def kill() -> None:
        teacher.signal(signal.SIGKILL)
        back.append(threading.Timer(0.2, teacher.start))
        back[-1].start()

    generator = random.Random(kills)
    for round_number in range(kills):
        kind = ("hidden", "topk")[round_number % 2]
        number = generator.randrange(frames[kind] - len(REQUESTS))  # the last ones may have arrived before the kill
        outages.clear()
        at_frame.arm(number, kill)
        answers = client.score(REQUESTS, SPECS[kind])
        back[-1].join()
        assert_same(answers, expected[kind])
        assert outages, number
        assert outages[0][0] - at_frame.happened_at < 1.0, outages[0]
    assert len(back) == kills


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_while_sequences_are_being_written_costs_only_time(kills, teacher, client, outages, monkeypatch):
    """Pieces that a dead teacher owes are asked for again; rows that it gave before are kept.

    Hidden states: the bits of logits depend on how many rows are multiplied at once.
    """
    at_frame, back = AtFrame(monkeypatch), []
    client.identity = replace(client.identity, block_tokens=32)
    asked = [replace(each, prompt_tokens=each.start + 1) for each in REQUESTS]
    prompts = [replace(each, ids=each.ids[: each.start + 1], end=each.start + 1) for each in asked]
    expected = client.score(asked, SPECS["hidden"])

    def kill() -> None:
        teacher.signal(signal.SIGKILL)
        back.append(threading.Timer(0.2, teacher.start))
        back[-1].start()

    generator = random.Random(kills)
    for _ in range(kills):
        outages.clear()
        at_frame.arm(generator.randrange(1, 40), kill)
        with ThreadPoolExecutor(1) as background:
            scoring = StreamedScoring(client, SPECS["hidden"], background)
            scoring.begin(dict(enumerate(prompts)))
            for tokens in range(25, 400, 25):
                for index, each in enumerate(asked):
                    rest = each.ids[each.prompt_tokens :]
                    scoring.piece(index, rest[:tokens], over=tokens >= len(rest))
                time.sleep(0.02)
            answers = scoring.finish(dict(enumerate(asked))).result()
        back[-1].join()
        assert_same([answers[index] for index in range(len(asked))], expected)
        assert outages
    assert len(back) == kills


def test_the_keepalive_that_finds_a_frozen_teacher():
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"] <= 20_000
    assert options["grpc.http2.ping_timeout_ms"] <= options["grpc.keepalive_timeout_ms"]
    assert options["grpc.http2.max_pings_without_data"] == 0  # as many as it takes


@pytest.mark.long
def test_a_frozen_teacher_is_noticed_and_waited_for(teacher, client, outages, monkeypatch):
    at_frame = AtFrame(monkeypatch)
    expected = client.score(REQUESTS, SPECS["hidden"])
    thaw = threading.Timer(40.0, teacher.signal, [signal.SIGCONT])

    def freeze() -> None:
        teacher.signal(signal.SIGSTOP)
        thaw.start()

    at_frame.arm(len(REQUESTS), freeze)
    answers = client.score(REQUESTS, SPECS["hidden"])
    thaw.join()
    assert_same(answers, expected)
    noticed = outages[0][0] - at_frame.happened_at
    print(f"\nnoticed after {noticed:.1f} s")
    assert noticed < 20
