"""Evaluations around a made-up engine: rows, resumption, failing items, frames, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.errors import CheckpointError, ConfigurationError, DataError, InvalidRequest
from tutelage.evaluator.cli import main
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Generation
from tutelage.evaluator.results import frames as fr
from tutelage.evaluator.runner.evaluation import Progress, Stopped, evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest, check

SETTINGS = EvaluationSettings(prompt="chat", max_new_tokens=8)
BOTH = (TaskRequest("arithmetic", "paper", 10), TaskRequest("arithmetic", "loglik", 6))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", manifest=True)


def evaluation_of(
    checkpoint: Path, *, tasks: tuple[TaskRequest, ...] = BOTH, name: str = "one", seed: int = 0
) -> Evaluation:
    labels = Labels(run="r1", student="gkd", teacher="big", objective="gkd", temperature=2.0, step=5, training_seed=7)
    return Evaluation(name, checkpoint, labels, tasks, seed)


def opening(engine: EchoEngine) -> Callable[[Path], EchoEngine]:
    return lambda _checkpoint: engine


def test_every_item_is_one_row_of_the_declared_schema(checkpoint: Path, tmp_path: Path) -> None:
    engine = EchoEngine()
    paths = evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path / "f", engines=opening(engine))
    assert [path.relative_to(tmp_path / "f").as_posix() for path in paths] == [
        "run=r1/task=arithmetic/one--paper.parquet",
        "run=r1/task=arithmetic/one--loglik.parquet",
    ]
    rows = fr.read(tmp_path / "f").collect()
    assert rows.schema == fr.SCHEMA
    paper = rows.filter(protocol="paper")
    assert paper["item_id"].to_list() == [str(index) for index in range(10)]
    assert set(paper["template"]) == {"chat"}
    assert paper["extracted"].to_list() == [str(tokens) for tokens in paper["prompt_tokens"]]
    assert paper["score"].to_list() == [float(a == b) for a, b in zip(paper["extracted"], paper["target"], strict=True)]
    assert set(paper["training_seed"]) == {7}
    loglik = rows.filter(protocol="loglik")
    assert loglik["choices_logp"].to_list() == [[-1.0, -2.0, -3.0, -4.0]] * 6
    assert set(loglik["finish_reason"]) == {"scored"}
    assert loglik["sampling_temperature"].null_count() == 6
    assert not list((tmp_path / "f.unfinished").iterdir())
    assert engine.closed


def test_doing_it_again_gives_the_same_rows_and_no_more(checkpoint: Path, tmp_path: Path) -> None:
    frames, twice = [], tmp_path / "twice"
    for folder in (twice, twice, tmp_path / "elsewhere"):
        evaluate(evaluation_of(checkpoint), SETTINGS, folder, engines=opening(EchoEngine()))
        frames.append(fr.read(folder).collect().drop("seconds"))
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_finished_work_is_not_done_again_and_other_work_is(checkpoint: Path, tmp_path: Path) -> None:
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path, engines=opening(EchoEngine()))

    def unneeded(_checkpoint: Path) -> EchoEngine:
        raise AssertionError("opened a model although every row is there")

    seen: list[Progress] = []
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path, engines=unneeded, on_progress=seen.append)
    assert (seen[-1].done, seen[-1].resumed, seen[-1].total) == (16, 16, 16)
    again = EchoEngine()
    evaluate(evaluation_of(checkpoint, seed=1), SETTINGS, tmp_path, engines=opening(again))
    assert sum(again.batches) == 16
    assert len(fr.read(tmp_path).collect()) == 16


def test_a_stopped_evaluation_goes_on_where_it_was(checkpoint: Path, tmp_path: Path) -> None:
    first, second, seen = EchoEngine(), EchoEngine(), list[Progress]()
    with pytest.raises(Stopped):
        evaluate(
            evaluation_of(checkpoint),
            SETTINGS,
            tmp_path,
            engines=opening(first),
            on_progress=seen.append,
            should_stop=lambda: bool(seen),
        )
    assert sum(first.batches) == 4
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path, engines=opening(second), on_progress=seen.append)
    assert sum(second.batches) == 12
    assert seen[-1].resumed == 4
    assert len(fr.read(tmp_path).collect().unique(["item_id", "protocol"])) == 16


def test_an_item_that_fails_is_a_row_with_its_error(checkpoint: Path, tmp_path: Path) -> None:
    whole = EchoEngine()
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path / "a", engines=opening(whole))
    lengths = fr.read(tmp_path / "a").filter(protocol="paper").collect()["prompt_tokens"]
    engine, seen = EchoEngine(fails_on=lengths.max()), list[Progress]()
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path / "b", engines=opening(engine), on_progress=seen.append)
    rows = fr.read(tmp_path / "b").collect()
    failed = rows.filter(pl.col("error") != "")
    assert len(rows) == 16
    assert len(failed) == (lengths == lengths.max()).sum() == seen[-1].failed
    assert failed["error"].unique().to_list() == ["RuntimeError: out of memory, say"]
    assert failed["score"].null_count() == len(failed)
    summary = fr.summarize(rows.lazy()).filter(protocol="paper").collect()
    assert summary["failed"][0] == len(failed)
    assert summary["n"][0] == 10 - len(failed)


def test_an_engine_that_cannot_generate_at_all_fails_no_item(checkpoint: Path, tmp_path: Path) -> None:
    class Refusing(EchoEngine):
        def generate(self, *_: object) -> list[Generation]:
            raise ConfigurationError("Mamba does not take a cache of transformers; use the engine vllm", "engine")

    with pytest.raises(ConfigurationError, match="use the engine vllm"):
        evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path / "f", engines=opening(Refusing()))
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_prompt_that_does_not_fit_is_a_row_with_its_error(checkpoint: Path, tmp_path: Path) -> None:
    engine = EchoEngine(max_tokens=28)
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path, engines=opening(engine))
    rows = fr.read(tmp_path).filter(protocol="paper").collect()
    assert len(rows) == 10
    failed = rows.filter(pl.col("error").str.contains("20 fit beside the answer"))
    assert 0 < len(failed) < 10


def test_missing_data_and_wrong_requests_are_refused_before_any_model_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUTELAGE_DATA_DIR", raising=False)
    with pytest.raises(DataError, match="gsm8k"):
        evaluate(evaluation_of(checkpoint, tasks=(TaskRequest("gsm8k", "paper"),)), SETTINGS, tmp_path)
    for tasks, reason in [
        ((), "no task"),
        ((TaskRequest("gsm8k", "loglik"),), "no protocol"),
        ((TaskRequest("gsm8k", "paper"), TaskRequest("gsm8k", "paper", 3)), "twice"),
    ]:
        with pytest.raises(InvalidRequest, match=reason):
            check(evaluation_of(checkpoint, tasks=tasks))
    with pytest.raises(InvalidRequest, match="is not an id"):
        check(evaluation_of(checkpoint, name="../up"))
    with pytest.raises(ConfigurationError, match="is not a name"):
        check(Evaluation("one", checkpoint, Labels(run="../../etc", student="s"), BOTH))


@pytest.mark.parametrize("harm", ["changed", "shorter", "missing", "no manifest", "no weights"])
def test_a_checkpoint_that_is_not_its_manifests_is_refused(harm: str, checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    if harm == "changed":
        weights.write_bytes(b"not so real")
        weights.write_bytes(b"nOt really")
    elif harm == "shorter":
        weights.write_bytes(b"not")
    elif harm == "missing":
        weights.unlink()
    elif harm == "no manifest":
        (checkpoint / "MANIFEST.json").write_text("{}")
    else:
        (checkpoint / "MANIFEST.json").unlink()
        weights.unlink()
    with pytest.raises(CheckpointError, match=r"manifest|checkpoint"):
        evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path, engines=opening(EchoEngine()))


def test_a_reader_sees_no_frame_that_is_not_whole(checkpoint: Path, tmp_path: Path) -> None:
    assert fr.read(tmp_path).collect().schema == fr.SCHEMA
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path, engines=opening(EchoEngine()))
    (tmp_path / "run=r1" / "task=arithmetic" / ".abc.tmp").write_bytes(b"half a file")
    assert len(fr.read(tmp_path).collect()) == 16


def test_summaries_are_the_means_and_their_standard_errors(checkpoint: Path, tmp_path: Path) -> None:
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path, engines=opening(EchoEngine()))
    scores = fr.read(tmp_path).filter(protocol="loglik").collect()["score"].to_list()
    summary = fr.summarize(fr.read(tmp_path)).filter(protocol="loglik").collect().to_dicts()[0]
    mean = sum(scores) / 6
    variance = sum((score - mean) ** 2 for score in scores) / 5
    assert summary["score"] == pytest.approx(mean)
    assert summary["standard_error"] == pytest.approx((variance / 6) ** 0.5)
    assert (summary["n"], summary["failed"]) == (6, 0)


def test_nothing_that_could_be_scored_is_said_with_the_reason_and_done_again(checkpoint: Path, tmp_path: Path) -> None:
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path / "f", engines=opening(EchoEngine(max_tokens=10)))
    (reason,) = fr.without_scores(fr.read(tmp_path / "f"))
    assert "arithmetic:paper of gkd: none of 10 rows has a score" in reason
    assert "2 fit beside the answer" in reason
    again = EchoEngine()
    evaluate(evaluation_of(checkpoint), SETTINGS, tmp_path / "f", engines=opening(again))
    assert sum(again.batches) == 10  # what has scores is not done again
    assert not fr.without_scores(fr.read(tmp_path / "f"))


def test_the_command_says_what_could_not_be_scored_and_ends_with_4(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tutelage.evaluator.runner.evaluation.open_engine", lambda *_, **__: EchoEngine(max_tokens=10))
    monkeypatch.setattr("tutelage.evaluator.runner.preflight.require_checkpoint", lambda checkpoint: None)
    flags = ["--checkpoint", str(checkpoint), "--tasks", "arithmetic:paper", "--out", str(tmp_path / "f")]
    assert main([*flags, "--limit", "4", "--prompt", "chat", "--engine", "transformers", "--max-new-tokens", "8"]) == 4
    shown = capsys.readouterr()
    assert "None" not in shown.out
    assert "accuracy – (n = 0, 4 failed)" in shown.out
    assert "none of 4 rows has a score; the first says: InvalidRequest: the prompt has" in shown.err
