"""The vLLM engine writes what the transformers engine writes, into the same rows."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Sampling
from tutelage.evaluator.models.registry import open_engine
from tutelage.evaluator.results.frames import read
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.manifest import commit
from tutelage.runtime.processes import left_behind

DIFFERENT = ["engine", "seconds"]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_both_engines_give_the_same_rows(
    packaged_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    tasks = (TaskRequest("arithmetic", "paper", 8), TaskRequest("arithmetic", "loglik", 8))
    evaluation = Evaluation("one", packaged_models[0], Labels("r1", "teacher"), tasks)
    for engine in ("transformers", "vllm"):
        settings = EvaluationSettings(prompt="chat", max_new_tokens=24, engine=engine, dtype="float32")
        evaluate(evaluation, settings, tmp_path / engine)
    ours, vllms = (read(tmp_path / engine).collect() for engine in ("transformers", "vllm"))
    assert set(vllms["engine"]) == {"vllm"}
    assert ours.filter(protocol="loglik").drop(DIFFERENT).equals(vllms.filter(protocol="loglik").drop(DIFFERENT))
    same = (ours["output"] == vllms["output"]).sum()
    assert same >= len(ours) - 1  # a tie in rounding may turn one greedy answer


@pytest.mark.long
@pytest.mark.timeout(400)
def test_two_runs_give_the_same_rows(
    packaged_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # Long texts in bfloat16, so that a batch that holds something else would turn some of them.
    settings = EvaluationSettings(prompt="chat", max_new_tokens=96, engine="vllm", dtype="bfloat16")
    evaluation = Evaluation(
        "one", packaged_models[0], Labels("r1", "teacher"), (TaskRequest("arithmetic", "paper", 64),)
    )
    for run in ("first", "second"):
        evaluate(evaluation, settings, tmp_path / run)
    first, second = (read(tmp_path / run).collect().drop("seconds") for run in ("first", "second"))
    assert first.equals(second)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_seeded_prompts_that_do_not_fit_one_batch_are_answered(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    engine = open_engine("vllm", tiny_model, dtype="float32", batch_size=64)
    try:
        # 12,800 tokens at once, three batches of vLLM's: by itself it would compute a prompt in part at each border.
        prompts = [[3 + (number + place) % 400 for place in range(200)] for number in range(64)]
        generations = engine.generate(prompts, range(64), Sampling(temperature=0.8, max_new_tokens=8))
    finally:
        engine.close()
    assert len(generations) == 64


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["starting", "generating"])
def test_a_signal_to_all_its_processes_ends_it_in_one_line(
    number: signal.Signals, code: int, moment: str, tiny_model: Path, tmp_path: Path
) -> None:
    checkpoint, mark = tmp_path / "model", {"TUTELAGE_TEST": str(tmp_path)}
    shutil.copytree(tiny_model, checkpoint)
    commit(checkpoint)  # so that it is pinned while it is worked on
    flags = ["--checkpoint", str(checkpoint), "--tasks", "arithmetic:paper", "--out", str(tmp_path / "frames")]
    flags += ["--engine", "vllm", "--batch-size", "16", "--max-new-tokens", "200"]
    program = "import sys; from tutelage.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "evaluate", *flags]
    environment = os.environ | mark | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    # Of the command, the reaper of its orphans and multiprocessing's tracker vLLM's process is the fourth.
    there = {
        "starting": lambda: len(left_behind("TUTELAGE_TEST", str(tmp_path))) >= 4,
        "generating": lambda: glob.glob("frames.unfinished/**/*.parquet", root_dir=tmp_path, recursive=True),
    }
    deadline = time.monotonic() + 120
    while not there[moment]():
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, number)
    assert process.wait(60) == code
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].endswith("the same command goes on with them")
    assert not [path for path in tmp_path.rglob("model.safetensors") if path.parent != checkpoint]
    time.sleep(1)
    assert not left_behind("TUTELAGE_TEST", str(tmp_path))
