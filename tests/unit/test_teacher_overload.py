"""What a student does when its teacher is full."""

from __future__ import annotations

import threading
import time

import grpc
import numpy as np
import pytest

from trainer_doubles import FaultyServicer, InProcessTeacher, serving
from tutelage.errors import Unreachable
from tutelage.identity import tokenizer_digests
from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.grpc_client import TeacherClient

SPEC = SignalSpec("topk", k=4, temperatures=(1.0,))
REQUESTS = [TokenSequence(np.arange(3, 9 + index, dtype=np.int32), 0, 5) for index in range(4)]
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


class Counting(FaultyServicer):
    asked = 0

    def _answer(self, request):
        self.asked += 1
        return super()._answer(request)


@pytest.fixture
def servicer(tiny_model):
    return Counting(InProcessTeacher(tiny_model), tiny_model)


def score(servicer, tiny_model, wait_seconds):
    with (
        serving(servicer) as address,
        TeacherClient(
            address, student_id="ann", wait_seconds=wait_seconds, tokenizer_digests=tokenizer_digests(tiny_model)
        ) as client,
    ):
        return client.score(REQUESTS, SPEC)


def test_only_what_was_refused_is_asked_again_and_not_before_the_teacher_said(servicer, tiny_model):
    servicer.refusals = [pb.Refusal(code=FULL, message="full", retry_after_milliseconds=400)] * 2
    started = time.monotonic()
    assert len(score(servicer, tiny_model, wait_seconds=10)) == 4
    assert time.monotonic() - started >= 0.4
    assert servicer.asked == 6


def test_a_teacher_that_stays_full_is_given_up(servicer, tiny_model):
    servicer.refusals = [pb.Refusal(code=FULL, message="full", retry_after_milliseconds=100)] * 1000
    with pytest.raises(Unreachable, match="full"):
        score(servicer, tiny_model, wait_seconds=0.5)


def test_a_teacher_that_was_full_and_then_says_nothing_was_full(servicer, tiny_model):
    servicer.refusals = [pb.Refusal(code=FULL, message="full", retry_after_milliseconds=1)] * 4
    given_up = threading.Event()

    def silent_when_asked_again(responses):
        if servicer.asked > 4:
            given_up.wait()
        return responses

    servicer.mischief = silent_when_asked_again
    try:
        with pytest.raises(Unreachable, match="full"):
            score(servicer, tiny_model, wait_seconds=1.0)
    finally:
        given_up.set()
