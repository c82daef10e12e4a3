"""Instruction following: prompts, references, ROUGE-L as `rouge-score` has it, five answers an item."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluator_support import EchoEngine, WordTokenizer, write_checkpoint
from tutelage.data.prompts import prompt_text
from tutelage.errors import ConfigurationError, DataError
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.protocols.open import SEEDS, rouge_l
from tutelage.evaluator.results.frames import chance_levels, read, summarize
from tutelage.evaluator.runner.evaluation import Progress, evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.evaluator.scoring.agreement import pair
from tutelage.evaluator.tasks import TASKS, task_of_name
from tutelage.evaluator.tasks.base import Choices

# F1 of the longest common subsequence of stemmed words, worked out by hand.
ROUGE = [
    ("the cat sat on the mat", ["the cat sat on the mat"], 1.0),
    ("the cat lay on the mat", ["the cat sat on the mat"], 5 / 6),
    ("cats", ["the cat"], 2 / 3),  # stemmed: "cat"; precision 1, recall 1/2
    ("mat the on", ["on the mat"], 1 / 3),
    ("", ["a reference"], 0.0),
    ("The Cat, SAT!", ["the cat sat"], 1.0),
    ("a b", ["c d", "a b c d"], 2 / 3),  # the best of the references
]


@pytest.mark.parametrize(("output", "references", "expected"), ROUGE)
def test_rouge_l_is_the_librarys(output: str, references: list[str], expected: float) -> None:
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    library = max(scorer.score(reference, output)["rougeL"].fmeasure for reference in references)
    assert rouge_l(output, references) == library
    assert library == pytest.approx(expected)


def test_an_answer_without_a_reference_has_no_score() -> None:
    assert rouge_l("anything", ()) is None


def write_lines(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluated(folder: Path, task: str, name: str, seen: list[Progress] | None = None) -> Path:
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    labels = Labels(run="r1", student=name)
    settings = EvaluationSettings(data_dir=folder, max_new_tokens=8)
    progress = [] if seen is None else seen
    evaluate(
        Evaluation(name, checkpoint, labels, (TaskRequest(task, "open"),)),
        settings,
        folder / "frames",
        engines=lambda _checkpoint: EchoEngine(),
        on_progress=progress.append,
    )
    return folder / "frames"


def test_each_item_is_answered_five_times_and_counted_once(tmp_path: Path) -> None:
    records = [
        {"instruction": "Count.", "input": "", "output": ["The answer is 29.", "no"]},
        {"instruction": "Long.", "input": "word " * 300, "output": "x"},
        {"instruction": "Sum.", "input": "1 2", "output": "nothing alike"},
    ]
    write_lines(tmp_path / "instruct" / "dolly.valid.jsonl", records)
    seen: list[Progress] = []
    frames = evaluated(tmp_path, "dolly", "one", seen)
    rows = read(frames).collect()
    assert rows.select("item_id", "seed").rows() == [(item, seed) for item in "012" for seed in SEEDS]
    assert (seen[-1].done, seen[-1].total, seen[-1].failed) == (15, 15, 0)
    assert rows.filter(item_id="1")["error"].str.contains("at most 256").all()
    assert set(rows.filter(item_id="1")["finish_reason"]) == {"too_long"}
    assert set(rows.filter(error="")["sampling_temperature"]) == {1.0}
    summary = summarize(read(frames)).collect().to_dicts()[0]
    assert (summary["n"], summary["failed"], summary["too_long"], summary["metric"]) == (2, 0, 1, "rougeL")
    means = [rows.filter(item_id=item)["score"].mean() for item in "02"]
    assert summary["score"] == pytest.approx(sum(means) / 2)
    assert summary["standard_error"] == pytest.approx(abs(means[0] - means[1]) / 2)
    other = read(evaluated(tmp_path, "dolly", "two")).filter(evaluation_id="two").collect()
    assert len(pair(rows, other)) == 10


def test_questions_without_references_are_answered_but_not_scored(tmp_path: Path) -> None:
    write_lines(tmp_path / "instruct" / "vicuna_questions_v1.jsonl", [{"question_id": 1, "text": "How?"}])
    rows = read(evaluated(tmp_path, "vicuna", "one")).collect()
    assert len(rows) == 5
    assert rows["score"].null_count() == 5
    assert set(rows["error"]) == {""}


def test_short_references_are_left_out_where_minillm_leaves_them_out(tmp_path: Path) -> None:
    records = [
        {"instruction": "a", "input": "", "output": "ten words are not enough for this one here now"},
        {"instruction": "b", "input": "", "output": ["short", "eleven words are enough for this one here and now too"]},
    ]
    write_lines(tmp_path / "instruct" / "sinst.valid.jsonl", records)
    assert [item.instruction for item in TASKS["s_ni"].items(tmp_path)] == ["b"]


@pytest.mark.data
def test_prompts_are_minillms(data_dir: Path) -> None:
    lines = (data_dir / "instruct" / "self_inst.valid.jsonl").read_text(encoding="utf-8").splitlines()
    items = TASKS["self_instruct"].items(data_dir)
    assert len(items) == 252
    for line, item in zip(lines, items, strict=True):
        assert prompt_text("alpaca", item.conversation, None) == json.loads(line)["prompt"]


def test_missing_files_are_refused_with_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"instruct/dolly\.valid\.jsonl, which is https"):
        TASKS["dolly"].items(tmp_path)


CUSTOM = """
name: capitals
data: capitals.jsonl
question: "Capital of {country}?"
answer: "{capital}"
choices: ["{capital}", "{other}"]
extraction: truth
chance_level: 0.5
"""


def test_a_task_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "capitals.jsonl", [{"country": "France", "capital": "Paris", "other": "Lyon"}])
    (tmp_path / "mine.yaml").write_text(CUSTOM)
    task = task_of_name(str(tmp_path / "mine.yaml"))
    assert (task.name, task.count, task.protocols) == ("capitals", 1, ("paper", "loglik"))
    choices = task.choices(task.items(None)[0])
    assert choices.contexts[0] == "Capital of France?"
    assert choices.continuations == (" Paris", " Lyon")
    assert choices.gold == 0


def test_a_task_of_ones_own_runs_and_is_labelled_by_its_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "capitals.jsonl", [{"country": "France", "capital": "Paris", "other": "Lyon"}] * 3)
    (tmp_path / "mine.yaml").write_text(CUSTOM)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    tasks = (TaskRequest(str(tmp_path / "mine.yaml"), "loglik"),)
    evaluate(
        Evaluation("one", checkpoint, Labels("r1", "s"), tasks),
        EvaluationSettings(),
        tmp_path / "frames",
        engines=lambda _checkpoint: EchoEngine(),
    )
    rows = read(tmp_path / "frames").collect()
    assert set(rows["task"]) == {"capitals"}
    assert rows["score"].to_list() == [1.0] * 3
    assert chance_levels(tmp_path / "frames", "r1") == {("capitals", "loglik"): 0.5}


class CharacterTokenizer(WordTokenizer):
    """The space before an empty choice is a token, so that it has a likelihood, and no character to divide it by."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))


@pytest.mark.parametrize("tokenizer", [WordTokenizer, CharacterTokenizer])
def test_an_empty_choice_costs_its_item_and_no_other(tokenizer: type[WordTokenizer], tmp_path: Path) -> None:
    engine = EchoEngine()
    engine.tokenizer = tokenizer()
    records = [{"country": "France", "capital": "Paris", "other": other} for other in ("", "Lyon")]
    write_lines(tmp_path / "capitals.jsonl", records)
    (tmp_path / "mine.yaml").write_text(CUSTOM)
    tasks = (TaskRequest(str(tmp_path / "mine.yaml"), "loglik"), TaskRequest("arithmetic", "loglik", 2))
    evaluate(
        Evaluation("one", write_checkpoint(tmp_path / "checkpoint"), Labels("r1", "s"), tasks),
        EvaluationSettings(),
        tmp_path / "frames",
        engines=lambda _checkpoint: engine,
    )
    rows = read(tmp_path / "frames").collect()
    assert len(rows) == 4
    errors = rows.filter(task="capitals").sort("item_id")["error"].to_list()
    assert errors == ["InvalidRequest: choice 2 of 2 is empty; nothing of it can be scored", ""]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (("name: capitals", "name: ../up"), ConfigurationError, "is not a name"),
        (("question:", "qestion:"), ConfigurationError, r"mine\.yaml: question: has to be given; qestion is not a key"),
        (("question:", "doc_to_text:"), ConfigurationError, "here that is question"),
        (("{country}", "{{country}}"), ConfigurationError, "names no field of a record"),
        (("{country}", "{country"), ConfigurationError, r"mine\.yaml: question: expected '}'"),
        (("{country}", "{contry}"), DataError, r"capitals\.jsonl, line 1 does not fill .* there is no 'contry'"),
        (('["{capital}", "{other}"]', '["{other}"]'), DataError, "is none of"),
        (("capitals.jsonl", "elsewhere.jsonl"), DataError, "is not a file"),
    ],
)
def test_a_file_that_describes_no_task_is_refused(
    change: tuple[str, str], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / "capitals.jsonl", [{"country": "France", "capital": "Paris", "other": "Lyon"}])
    (tmp_path / "mine.yaml").write_text(CUSTOM.replace(*change))
    with pytest.raises(error, match=reason):
        first_choices(tmp_path / "mine.yaml")


def first_choices(path: Path) -> Choices:
    task = task_of_name(str(path))
    return task.choices(task.items(None)[0])
