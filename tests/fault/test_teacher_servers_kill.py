"""Kill -9 of one of two servers in the middle of a batch: the other gives what it owed, and nobody waits."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time

import numpy as np
import pytest

from fake_teacher import VOCABULARY_SIZE
from restartable_teacher import restartable_teacher
from teacher_process import end, start
from tiny import write_tiny_model
from trainer_cohorts import assert_finished, running, steps_done, wait_until, write_cohort
from tutelage.identity import tokenizer_digests
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalSpec
from tutelage.trainer.teacher.frame_decoder import Answer
from tutelage.trainer.teacher.grpc_client import TeacherClient

HIDDEN = SignalSpec("hidden")
LONGEST_WAIT_SECONDS = 5.0


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_the_other_server_gives_what_a_killed_one_owed(kills, monkeypatch):
    rng, draw = np.random.default_rng(0), random.Random(kills)
    sequences = [
        TokenSequence(rng.integers(0, VOCABULARY_SIZE, length).astype(np.int32), 0, length)
        for length in range(100, 400, 12)
    ]
    add, taken, killed = Answer.add, [0], [0.0]
    with restartable_teacher() as one, restartable_teacher() as other:
        servers = [one.address, other.address]
        with TeacherClient(servers, student_id="ann", wait_seconds=60, tokenizer_digests={}) as client:
            expected = client.score(sequences, HIDDEN)
            for _ in range(kills):
                victim, number = draw.choice([one, other]), draw.randrange(80)

                def add_and_kill(answer, frame, victim=victim, number=number) -> None:
                    if taken[0] == number:
                        victim.signal(signal.SIGKILL)
                        killed[0] = time.monotonic()
                    taken[0] += 1
                    add(answer, frame)

                taken[0] = 0
                monkeypatch.setattr(Answer, "add", add_and_kill)
                answers = client.score(sequences, HIDDEN)
                assert time.monotonic() - killed[0] < LONGEST_WAIT_SECONDS
                for given, wanted in zip(answers, expected, strict=True):
                    assert np.array_equal(given["hidden_RD"], wanted["hidden_RD"])
                victim.start()
                deadline = time.monotonic() + 20
                while len(client.servers) < 2 and time.monotonic() < deadline:
                    time.sleep(0.02)
                assert len(client.servers) == 2, "it takes part again"
            assert client.waited_seconds == 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_cohort_goes_on_without_a_killed_server_and_one_with_other_weights_is_refused(tiny_model, tmp_path, caplog):
    steps, log = 120, tmp_path / "log"
    write_tiny_model(tmp_path / "other", seed=1)
    options = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(2**28))
    teachers = []
    try:
        for name, model in (("one", tiny_model), ("two", tiny_model), ("other", tmp_path / "other")):
            teachers.append(start(tmp_path / f"teacher-{name}", model, *options))
        addresses = [teacher.address for teacher in teachers]
        cohort = write_cohort(tmp_path, tiny_model, addresses, steps)
        folders = [tmp_path / "run/students" / student for student in ("ann", "bob")]
        with running(["train", "--config", str(cohort)], log) as train:
            wait_until(lambda: min(map(steps_done, folders)) >= 8, 120, log, train)
            os.kill(teachers[1].process.pid, signal.SIGKILL)
            assert max(map(steps_done, folders)) < steps
            assert train.wait(300) == 0, log.read_text()[-3000:]
        assert_finished(tmp_path, steps)
        rows = [json.loads(line) for folder in folders for line in (folder / "metrics.jsonl").read_text().splitlines()]
        waits = [row.get("seconds/waiting", 0.0) for row in rows]
        scoring = [row.get("seconds/scoring", 0.0) for row in rows]
        print(f"\nlongest wait {max(waits):.2f} s, longest scoring {max(scoring):.2f} s")
        assert max(waits) + max(scoring) < LONGEST_WAIT_SECONDS
        with (
            caplog.at_level(logging.WARNING),
            TeacherClient(
                addresses, student_id="eve", wait_seconds=60, tokenizer_digests=tokenizer_digests(tiny_model)
            ) as client,
        ):
            assert client.servers == (addresses[0],)
        assert f"the teacher at {addresses[2]} is not used: teacher: the teacher at {addresses[2]} has weights" in (
            caplog.text
        )
    finally:
        for teacher in teachers:
            end(teacher.process)
