"""Checkpoints reach the evaluator, and an evaluator that is away never disturbs the training."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from trainer_cases import student_config
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as rpc
from tutelage.trainer.cluster import evaluator_client
from tutelage.trainer.cluster.evaluator_client import EvaluatorClient, evaluation_id_of
from tutelage.trainer.config.services import EvaluatorConfig


class Recorder(rpc.EvaluatorServiceServicer):
    """Keeps what it is sent, after as many failures as it is told."""

    def __init__(self, failures: int = 0, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self.requests: list[pb.SubmitEvaluationRequest] = []
        self.failures, self.code = failures, code
        self.answers = threading.Event()
        self.answers.set()

    def SubmitEvaluation(self, request, context):  # noqa: N802
        self.answers.wait(5)
        if self.failures:
            self.failures -= 1
            context.abort(self.code, "not now")
        self.requests.append(request)
        return pb.SubmitEvaluationResponse(evaluation_id=request.evaluation_id)


@contextmanager
def serving(recorder: Recorder):
    server = grpc.server(futures.ThreadPoolExecutor(2))
    rpc.add_EvaluatorServiceServicer_to_server(recorder, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def client_of(address, tmp_path, tiny_model):
    config = EvaluatorConfig(address=address, tasks=[{"task": "addsub", "limit": 5}], every_steps=2)
    student = student_config(tiny_model, tmp_path / "rows.jsonl", seed=4, objective={"temperature": 2.0, "noise": 0.5})
    return EvaluatorClient(config, run="run", student=student, teacher="tiny", folder=tmp_path)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(evaluator_client, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(evaluator_client, "_PATIENCE_SECONDS", 1.0)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("failures", [0, 2, 20])
def test_a_checkpoint_is_submitted_with_all_its_labels(failures, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(evaluator_client, "_PATIENCE_SECONDS", 60.0)
    recorder = Recorder(failures)
    with serving(recorder) as address, client_of(address, tmp_path, tiny_model) as client:
        client.submit(6, tmp_path, finished=True)
    (request,) = recorder.requests
    assert request == pb.SubmitEvaluationRequest(
        evaluation_id="run.ann.step-6",
        checkpoint=str(tmp_path.resolve()),
        labels=pb.EvaluationLabels(
            run="run",
            student="ann",
            teacher="tiny",
            objective="gkd",
            temperature=2.0,
            noise=0.5,
            step=6,
            training_seed=4,
        ),
        tasks=[pb.TaskRequest(task="addsub", protocol="paper", limit=5)],
        seed=4,
    )
    assert lines(tmp_path) == [{"evaluation_id": "run.ann.step-6", "step": 6, "submitted": True, "error": ""}]


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT])
def test_a_failure_is_logged_and_recorded_and_nothing_waits(code, tmp_path, tiny_model, caplog):
    recorder = Recorder(99, code)
    recorder.answers.clear()
    with serving(recorder) as address, client_of(address, tmp_path, tiny_model) as client:
        client.submit(3, tmp_path)
        assert recorder.failures == 99  # it has not answered yet
        recorder.answers.set()
        with caplog.at_level(logging.WARNING):
            client.close()
    (line,) = lines(tmp_path)
    assert not line["submitted"]
    assert "not now" in line["error"]
    assert "run.ann.step-3" in caplog.text


def test_what_is_sent_while_the_evaluator_is_away_is_waited_for_once(tmp_path, tiny_model):
    with serving(Recorder(10**6)) as address, client_of(address, tmp_path, tiny_model) as client:
        for step in range(4):
            client.submit(step, tmp_path, finished=step == 3)
        begin = time.monotonic()
        client.close()
        assert 0.5 < time.monotonic() - begin < 2.5
    assert [line["submitted"] for line in lines(tmp_path)] == [False] * 4


def test_a_training_that_goes_on_later_does_not_wait_for_an_evaluator_that_is_away(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(evaluator_client, "_PATIENCE_SECONDS", 60.0)
    recorder = Recorder(10**6)
    with serving(recorder) as address, client_of(address, tmp_path, tiny_model) as client:
        for step in range(4):
            client.submit(step, tmp_path)
        begin = time.monotonic()
        client.close()
        assert time.monotonic() - begin < 30
    assert [line["submitted"] for line in lines(tmp_path)] == [False] * 4


def test_an_evaluator_that_refuses_is_not_away(tmp_path, tiny_model):
    """What it was away for before it refused is no part of the next time that it is away."""
    recorder = Recorder(1)
    with serving(recorder) as address, client_of(address, tmp_path, tiny_model) as client:
        client._away_since = time.monotonic() - 100
        recorder.code = grpc.StatusCode.INVALID_ARGUMENT
        client.submit(1, tmp_path)
        wait_until_sent(client)
        recorder.failures, recorder.code = 5, grpc.StatusCode.UNAVAILABLE
        client.submit(2, tmp_path)
        wait_until_sent(client)
    assert [line["submitted"] for line in lines(tmp_path)] == [False, True]


def wait_until_sent(client):
    client._thread.submit(lambda: None).result(30)


def test_what_the_log_says_was_taken_is_not_sent_again(tmp_path, tiny_model):
    recorder = Recorder()
    (tmp_path / "evaluations.jsonl").write_text(
        '{"evaluation_id": "run.ann.step-2", "step": 2, "submitted": false, "error": "away"}\n'
        '{"evaluation_id": "run.ann.step-4", "step": 4, "submitted": true, "error": ""}\n'
        '{"evaluation_id": "run.ann.st'
    )
    with serving(recorder) as address, client_of(address, tmp_path, tiny_model) as client:
        for step in (2, 4, 6):
            client.submit_again(step, tmp_path)
        client.submit(4, tmp_path)
    assert [request.labels.step for request in recorder.requests] == [2, 6, 4]


def test_every_run_and_student_has_evaluations_that_the_evaluator_takes_and_none_shares_one():
    """Names of 64 each, which the evaluator's rule of 128 leaves no room for a step beside."""
    runs, students = ("r" * 64, "r" * 63 + "s", "run"), ("a" * 64, "a" * 63 + "b", "ann")
    steps = (0, 10, 99_999_999)
    ids = [evaluation_id_of(run, student, step) for run in runs for student in students for step in steps]
    assert len(set(ids)) == len(ids)
    for name in ids:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,127}", name), name
    assert evaluation_id_of("run", "ann", 10) == "run.ann.step-10"
    assert evaluation_id_of("r" * 64, "a" * 64, 10).endswith(".step-10")


def test_a_record_that_cannot_be_written_is_told_in_the_log(tmp_path, tiny_model, caplog):
    (tmp_path / "evaluations.jsonl").mkdir()
    recorder = Recorder()
    with (
        caplog.at_level(logging.WARNING),
        serving(recorder) as address,
        client_of(address, tmp_path, tiny_model) as client,
    ):
        client.submit(6, tmp_path)
    assert len(recorder.requests) == 1
    assert "evaluations.jsonl cannot be written" in caplog.text
    assert "run.ann.step-6" in caplog.text
