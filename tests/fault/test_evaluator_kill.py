"""Kill -9 the evaluator in the middle: it goes on where it was, no row twice, no row missing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from tutelage.evaluator.results.frames import read
from tutelage.rpc.v1 import evaluator_pb2 as pb
from tutelage.rpc.v1 import evaluator_pb2_grpc as pb_grpc

ITEMS = 40
LOGLIK_ITEMS = 4 * ITEMS  # They are quick: enough of them, or none is left when the second signal arrives.
ALL_ITEMS = ITEMS + LOGLIK_ITEMS


def start(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The service as people start it, and its address."""
    address_file = folder / "address"
    address_file.unlink(missing_ok=True)
    flags = ["--port", "0", "--address-file", str(address_file)]
    flags += ["--frames", str(folder / "frames"), "--queue", str(folder / "queue")]
    flags += ["--prompt", "chat", "--max-new-tokens", "40", "--batch-size", "2", "--dtype", "float32"]
    flags += ["--engine", "transformers"]
    program = "import sys; from tutelage.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, "evaluate", "serve", *flags], env=environment, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 120
    while not address_file.exists():
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, address_file.read_text().strip()


def watch(address: str, *, until_items: int) -> pb.EvaluationStatus:
    """The first status with so many items, or the last one."""
    with grpc.insecure_channel(address) as channel:
        call = pb_grpc.EvaluatorServiceStub(channel).WatchEvaluation(pb.WatchEvaluationRequest(evaluation_id="first"))
        for response in call:
            if response.status.items_done >= until_items or response.status.state == pb.EVALUATION_STATE_FAILED:
                break
        return response.status


@pytest.mark.timeout(240)
def test_killed_and_then_terminated_it_completes_without_doubles(tiny_model: Path, tmp_path: Path) -> None:
    request = pb.SubmitEvaluationRequest(
        evaluation_id="first",
        checkpoint=str(tiny_model),
        labels=pb.EvaluationLabels(run="r1", student="tiny"),
        tasks=[
            pb.TaskRequest(task="arithmetic", protocol="paper", limit=ITEMS),
            pb.TaskRequest(task="arithmetic", protocol="loglik", limit=LOGLIK_ITEMS),
        ],
    )
    process, address = start(tmp_path)
    try:
        with grpc.insecure_channel(address) as channel:
            pb_grpc.EvaluatorServiceStub(channel).SubmitEvaluation(request)
        for items, number in ((8, signal.SIGKILL), (ITEMS + 6, signal.SIGTERM)):
            status = watch(address, until_items=items)
            assert status.items_done < ALL_ITEMS, "too fast to be killed in the middle"
            process.send_signal(number)
            process.wait(timeout=30)
            assert number == signal.SIGKILL or process.returncode == 0
            process, address = start(tmp_path)
        status = watch(address, until_items=10**6)
        assert status.state == pb.EVALUATION_STATE_DONE, status.error
    finally:
        process.kill()
        process.wait()
    rows = read(tmp_path / "frames").collect()
    assert len(rows) == ALL_ITEMS
    assert rows.select("protocol", "item_id").n_unique() == ALL_ITEMS
    assert set(rows["error"]) == {""}
    assert not list((tmp_path / "frames.unfinished").iterdir())
    _assert_same_as_uninterrupted(tiny_model, tmp_path)


def _assert_same_as_uninterrupted(tiny_model: Path, folder: Path) -> None:
    from tutelage.evaluator.config import EvaluationSettings
    from tutelage.evaluator.runner.evaluation import evaluate
    from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest

    tasks = (TaskRequest("arithmetic", "paper", ITEMS), TaskRequest("arithmetic", "loglik", LOGLIK_ITEMS))
    settings = EvaluationSettings(
        prompt="chat", max_new_tokens=40, batch_size=2, dtype="float32", engine="transformers"
    )
    evaluate(Evaluation("first", tiny_model, Labels("r1", "tiny"), tasks), settings, folder / "again")
    columns = ["protocol", "item_id", "output", "extracted", "score"]
    interrupted = read(folder / "frames").select(columns).sort(columns).collect()
    assert read(folder / "again").select(columns).sort(columns).collect().equals(interrupted)
