"""Our rows in the harness's files, and what its gsm8k filters read (benchmarks/evaluator_parity.py compares more)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evaluator_support import EchoEngine, write_checkpoint
from pace import least_seconds
from tutelage.evaluator.config import EvaluationSettings, ExportConfig
from tutelage.evaluator.results.export import export
from tutelage.evaluator.results.lm_eval import INVALID, gsm8k_exact_match, gsm8k_flexible, gsm8k_strict
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest

CASES = [
    ("so #### 42", "42", "42"),
    ("The answer is $1,234.", INVALID, "$1,234."),
    ("none", INVALID, INVALID),
    ("#### -3.5. then 7", "-3.5.", "7"),
]


@pytest.mark.parametrize(("output", "strict", "flexible"), CASES)
def test_the_filters(output: str, strict: str, flexible: str) -> None:
    assert (gsm8k_strict(output), gsm8k_flexible(output)) == (strict, flexible)


def test_matches_ignore_commas_dollars_and_a_last_dot() -> None:
    assert gsm8k_exact_match("$1,234.", "1234") == 1.0
    assert gsm8k_exact_match("-3.5.", "-3.5") == 1.0
    assert gsm8k_exact_match("18.0", "18") == 0.0
    assert gsm8k_exact_match(INVALID, "18") == 0.0


@pytest.mark.parametrize("text", ["1" * 100_000, "#### " * 20_000, "-" * 100_000, "$,." * 33_000, "- 1" * 33_000])
def test_a_hundred_kilobytes_take_at_most_fifty_milliseconds(text: str) -> None:
    assert least_seconds(lambda: (gsm8k_strict(text), gsm8k_flexible(text))) <= 0.05


ARC = (
    "Please choose the correct answer to the question: Why?\n\nAnswer1: a b Answer2: c \n\n"
    "Answer format: answer1/answer2"
)


@pytest.fixture
def exported(tmp_path: Path) -> list[Path]:
    """ARC-Easy of two items and the generated task, exported for the harness's tools."""
    data = tmp_path / "data" / "tasks" / "ARC-Easy" / "test.json"
    data.parent.mkdir(parents=True)
    items = [{"instruction": ARC, "input": "", "answer": answer} for answer in ("answer1", "answer2")]
    data.write_text(json.dumps(items))
    tasks = (TaskRequest("ARC-Easy", "loglik"), TaskRequest("arithmetic", "paper", 3))
    evaluation = Evaluation("one", write_checkpoint(tmp_path / "a model"), Labels("r1", "s"), tasks)
    settings = EvaluationSettings(prompt="chat", max_new_tokens=8, data_dir=tmp_path / "data")
    evaluate(evaluation, settings, tmp_path / "frames", engines=lambda _: EchoEngine())
    config = ExportConfig(
        frames=tmp_path / "frames", format="lm-eval", out=tmp_path / "out", data_dir=tmp_path / "data"
    )
    first, again = export(config), export(config)
    assert first == again  # the same rows replace their files
    return first


def test_files_lie_where_the_harness_puts_them(exported: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "out" / str(tmp_path / "a model").replace("/", "__")
    assert {path.parent for path in exported} == {folder}
    names = [path.name for path in exported]
    date = re.fullmatch(r"results_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{6})\.json", names[0])[1]
    assert sorted(names[1:]) == [f"samples_arc_easy_{date}.jsonl", f"samples_arithmetic_paper_{date}.jsonl"]


def test_results_say_what_its_tables_show(exported: list[Path]) -> None:
    results = json.loads(exported[0].read_text())
    assert results["results"]["arc_easy"]["acc,none"] == 0.5
    assert results["results"]["arithmetic_paper"]["sample_len"] == 3
    assert results["n-shot"] == {"arc_easy": 0, "arithmetic_paper": 0}
    assert results["n-samples"]["arithmetic_paper"] == {"original": 1000, "effective": 3}
    assert results["higher_is_better"]["arc_easy"] == {"acc": True, "acc_norm": True}
    assert results["configs"]["arc_easy"]["output_type"] == "multiple_choice"
    assert results["versions"]["arc_easy"] == 1


def test_samples_have_their_documents_and_requests(exported: list[Path]) -> None:
    path = next(path for path in exported if "arc_easy" in path.name)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["doc"]["instruction"] == ARC
    assert (first["acc"], second["acc"]) == (1.0, 0.0)
    assert first["arguments"] == {
        "gen_args_0": {"arg_0": "Question: Why?\nAnswer:", "arg_1": " a b"},
        "gen_args_1": {"arg_0": "Question: Why?\nAnswer:", "arg_1": " c "},
    }
    assert first["resps"] == [[["-1.0", "None"]], [["-2.0", "None"]]]


def test_its_own_tools_find_and_read_them(exported: list[Path], tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm-evaluation-harness is not installed here")
    found = [path.relative_to(tmp_path).as_posix() for path in exported]
    assert utils.get_results_filenames(found) == found[:1]
    samples = utils.get_sample_results_filenames(found)
    assert samples == found[1:]
    assert {utils.get_file_task_name(Path(path).name) for path in samples} == {"arc_easy", "arithmetic_paper"}
    assert len({utils.get_file_datetime(Path(path).name) for path in samples}) == 1
    assert utils.sanitize_model_name(str(tmp_path / "a model")) == exported[0].parent.name
    table = utils.make_table(json.loads(exported[0].read_text()))
    assert re.search(r"\|arc_easy +\| +1\|none +\| +0\|acc +\|↑ +\| +0\.5\|± +\| +0\.5\|", table)
