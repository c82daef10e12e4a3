"""Every committed checkpoint of a run is evaluated once; others are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.errors import CheckpointError, Conflict, NotFound
from tutelage.evaluator.config import WatchConfig
from tutelage.evaluator.results.frames import read
from tutelage.evaluator.runner import evaluation as evaluation_module
from tutelage.evaluator.runner.requests import Evaluation
from tutelage.evaluator.runner.watch import watch

STUDENT = """
id: gkd
seed: 3
objective: {name: gkd, temperature: 2.0, noise: 1.0}
"""


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_module, "open_engine", lambda *_args, **_options: EchoEngine())


def checkpoint_of(run_dir: Path, student: str, step: int, *, manifest: bool = True) -> Path:
    return write_checkpoint(run_dir / "students" / student / "checkpoints" / f"step-{step:08d}", manifest=manifest)


def config_of(run_dir: Path, **fields: object) -> WatchConfig:
    content = {
        "run_dir": run_dir,
        "tasks": "arithmetic:loglik",
        "limit": 3,
        "out": run_dir / "frames",
        "teacher": "big",
    }
    return WatchConfig(**content, **fields)


def test_committed_checkpoints_are_evaluated_with_their_labels(tmp_path: Path) -> None:
    run_dir = tmp_path / "r7"
    for step in (20, 5):
        checkpoint_of(run_dir, "gkd", step)
    checkpoint_of(run_dir, "gkd", 30, manifest=False)
    (run_dir / "students" / "gkd" / "student.yaml").write_text(STUDENT)
    done = [evaluation for evaluation, _ in watch(config_of(run_dir, once=True))]
    assert [one.evaluation_id for one in done] == ["r7.gkd.step-5", "r7.gkd.step-20"]
    rows = read(run_dir / "frames").collect()
    assert len(rows) == 6
    columns = ["run", "student", "teacher", "objective", "temperature", "noise", "training_seed"]
    assert rows.select(columns).unique().rows() == [("r7", "gkd", "big", "gkd", 2.0, 1.0, 3)]


def test_what_comes_later_is_evaluated_too_and_each_once(tmp_path: Path) -> None:
    checkpoint_of(tmp_path, "a", 1)
    watching = watch(config_of(tmp_path, poll_seconds=0.01))
    assert next(watching)[0].labels.step == 1
    checkpoint_of(tmp_path, "b", 1)
    checkpoint_of(tmp_path, "a", 2)
    assert [(one.labels.student, one.labels.step) for one, _ in (next(watching), next(watching))] == [
        ("b", 1),
        ("a", 2),
    ]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = checkpoint_of(tmp_path, "a", 1)
    (damaged / "model.safetensors").write_bytes(b"nothing like it")
    checkpoint_of(tmp_path, "a", 2)
    assert [one.labels.step for one, _ in watch(config_of(tmp_path, once=True))] == [2]
    assert "passed over" in caplog.text


def test_a_checkpoint_whose_labels_another_has_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for student in ("ann", "bob"):
        checkpoint_of(tmp_path, student, 1)

    def evaluated(evaluation: Evaluation, *_arguments: object) -> None:
        if evaluation.labels.student == "ann":
            raise Conflict("another checkpoint has rows of these labels", "labels")

    monkeypatch.setattr("tutelage.evaluator.runner.watch.evaluate", evaluated)
    ((done, _),) = watch(config_of(tmp_path, once=True))
    assert done.labels.student == "bob"
    assert "another checkpoint" in caplog.text


def test_a_run_is_called_as_its_cohort_says(tmp_path: Path) -> None:
    checkpoint_of(tmp_path / "exp 1", "a", 1)
    (tmp_path / "exp 1" / "cohort.yaml").write_text("run: qwen-math\n")
    ((done, _),) = watch(config_of(tmp_path / "exp 1", once=True))
    assert done.labels.run == "qwen-math"


def test_a_full_disk_is_no_fault_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_of(tmp_path, "a", 1)

    def full(*_: object, **__: object) -> None:
        raise CheckpointError("cannot write one--loglik.parquet: no space left on device")

    monkeypatch.setattr(evaluation_module.fr, "write_frame", full)
    with pytest.raises(CheckpointError, match="no space left"):
        list(watch(config_of(tmp_path, once=True)))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"students does not exist"):
        next(watch(config_of(tmp_path, once=True)))


def test_exports_are_what_the_rows_say(tmp_path: Path) -> None:
    from tutelage.evaluator.config import ExportConfig
    from tutelage.evaluator.results.export import export

    checkpoint_of(tmp_path, "a", 1)
    config = config_of(tmp_path, once=True).model_copy(update={"tasks": "arithmetic:loglik,arithmetic:paper"})
    list(watch(config))
    rows = read(tmp_path / "frames").collect()
    means = {protocol: rows.filter(protocol=protocol)["score"].mean() for protocol in ("loglik", "paper")}
    paths = export(ExportConfig(frames=tmp_path / "frames", format="lm-eval", out=tmp_path / "out"))
    results = json.loads(paths[0].read_text())["results"]
    assert results["arithmetic_loglik"]["acc,none"] == pytest.approx(means["loglik"])
    assert results["arithmetic_paper"]["exact_match,paper"] == pytest.approx(means["paper"])
    samples = [json.loads(line) for line in paths[1].read_text().splitlines()]
    assert {"doc_id", "target", "resps", "filtered_resps", "filter", "acc"} <= set(samples[0])
    assert len(samples) == 3
    table = export(ExportConfig(frames=tmp_path / "frames", format="markdown", out=tmp_path / "out"))[0].read_text()
    assert f"{100 * means['loglik']:.1f} ±" in table
    csv = export(ExportConfig(frames=tmp_path / "frames", format="csv", out=tmp_path / "out"))[0].read_text()
    assert len(csv.splitlines()) == 3
