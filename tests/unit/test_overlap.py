"""Test items among training rows: word for word, and by 13 words in a row."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext

import pytest
import yaml

from trainer_cases import student_config
from tutelage.config import to_yaml
from tutelage.data.conversations import conversation_of
from tutelage.data.overlap import Overlap, overlaps, texts_of
from tutelage.evaluator.cli import main as evaluate
from tutelage.evaluator.report.run_data import read_preflight
from tutelage.evaluator.tasks.arithmetic_generator import generate
from tutelage.trainer.cli import main as train
from tutelage.trainer.cluster import supervisor
from tutelage.trainer.cluster.task_items import findings_of_cohort
from tutelage.trainer.config.run import CohortConfig
from tutelage.trainer.config.student import StudentConfig

WORDS = [f"word{number}" for number in range(15)]


@pytest.fixture(autouse=True)
def own_tree(monkeypatch):
    """The evaluator's command that is asked is of this tree, wherever the package is installed from."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def found(item: str, *rows: str) -> Overlap:
    return overlaps({"task": [item]}, [(f"row {number}", [row]) for number, row in enumerate(rows)])["task"]


@pytest.mark.parametrize(
    ("item", "row", "exact", "shared"),
    [
        ("What is 3 + 4?", "  what is\n3 +  4? ", 1, 0),
        ("What is 3 + 4?", "What is 3 + 4", 0, 0),
        ("What is 3 + 4?", "What is 3 + 4? It is 7.", 0, 0),  # word for word means all of a text
        (" ".join(WORDS[:13]), f"Before, {', '.join(WORDS[:13]).upper()}; after.", 0, 1),
        (" ".join(WORDS[:12]), f"Before, {', '.join(WORDS[:12]).upper()}; after.", 0, 0),
        (" ".join(WORDS), " ".join(WORDS[2:]) + " else", 0, 1),
        (" ".join(WORDS), " ".join([*WORDS[:12], "else", *WORDS[12:]]), 0, 0),
        (" ".join(WORDS), " ".join(WORDS), 1, 0),  # counted once
        ("costs 1,000 " + " ".join(WORDS[:12]), "COSTS 1000 " + " . ".join(WORDS[:12]), 0, 1),
    ],
)
def test_exact_and_by_thirteen_words(item, row, exact, shared):
    overlap = found(item, "something else", row)
    assert (overlap.items, overlap.exact, overlap.shared) == (1, exact, shared)
    assert overlap.example == ((0, "row 1") if exact + shared else None)


APPLES = "{} apples in the morning and {} apples in the evening; how many apples is that in all?"


@pytest.mark.parametrize(
    ("row", "shared"),
    [
        (f"Tess found {APPLES.format(3, 8)}", 1),
        (f"Tess found {APPLES.format(5, 8)}", 0),  # shares 14 words with 8 among them
        (f"Tess found {APPLES.format(8, 8)}", 0),
        (f"Tess found {APPLES.format(3, 3)}", 0),
        ("Tess ate 3 of " + APPLES.format(5, 8), 1),
        ("Tess found 3. " + APPLES.format("", "eight"), 0),
    ],
)
def test_a_problem_with_another_number_is_another_problem(row, shared):
    assert found(f"Nils found {APPLES.format(3, 8)}", row).shared == shared


def test_numbers_count_in_the_text_that_has_the_words():
    item, sibling = f"Nils found {APPLES.format(3, 8)}", f"Tess found {APPLES.format(5, 8)}"
    assert overlaps({"task": [item]}, [("a:1", [sibling, "Not 3, but 5 + 8 = 13."])])["task"].shared == 0
    assert overlaps({"task": [item]}, [("a:1", [sibling, "And if it were 3", item + "!"])])["task"].shared == 1


def test_problems_of_one_template_are_not_each_other():
    tests, rows = generate("test", 1000, seed=0), generate("train", 4000, seed=0)
    items = [each["instruction"] for each in tests]
    texts = [(str(number), [each["instruction"], each["output"]]) for number, each in enumerate(rows)]
    assert overlaps({"arithmetic": items}, texts)["arithmetic"] == Overlap(1000, 0, 0, None, short=0)
    longer = f"Here is one for you: {items[7]}"  # 13 of its words are that item's, and its numbers
    one = overlaps({"arithmetic": items}, [*texts, ("new", [longer])])["arithmetic"]
    assert one == Overlap(1000, 0, 1, (7, "new"), short=0)


@pytest.mark.parametrize(("items", "shared"), [(10, 10), (11, 0)])
def test_words_that_more_than_ten_items_have_are_the_tasks_template(items, shared):
    template = " ".join(WORDS[:13])
    asked = [f"{number} so {template} {number} so" for number in "abcdefghijk"[:items]]
    assert overlaps({"task": [*asked, "else"]}, [("a:1", [template])])["task"].shared == shared


@pytest.mark.parametrize(("rows", "shared"), [(10, 1), (11, 0)])
def test_words_that_more_than_ten_rows_have_are_a_template(rows, shared):
    template = " ".join(WORDS[:13])
    assert found(f"{template} apples", *[f"{template} {number}" for number in range(rows)]).shared == shared
    assert found(f"{template} apples", *[f"{template} apples"] * rows).exact == 1


def test_what_all_items_of_a_task_begin_and_end_with_is_its_template():
    asks, ends = " ".join(WORDS[:10]), " ".join(WORDS[10:])
    items = [f"{asks} is {number} a number {ends}" for number in range(11)]
    rows = [("a:1", [f"{asks} is 3 a letter"]), ("a:2", [f"a number {ends} {ends} {ends}"])]
    # Ten words of the template and three of a question that another item has as well are not that item.
    assert overlaps({"task": items}, rows)["task"] == Overlap(items=11, exact=0, shared=0, example=None, short=11)
    assert overlaps({"task": items[3:4]}, rows)["task"].shared == 1  # of one item nobody can tell


def test_each_task_is_counted_for_itself_and_an_exact_example_comes_first():
    items = [" ".join(WORDS), "What is 3 + 4?", "What is 5 + 6?"]
    rows = [("a:1", [" ".join(WORDS) + " else"]), ("a:2", ["What is 3 + 4?", "7"])]
    assert overlaps({"first": items, "second": items[2:]}, rows) == {
        "first": Overlap(items=3, exact=1, shared=1, example=(1, "a:2"), short=2),
        "second": Overlap(items=1, exact=0, shared=0, example=None, short=1),
    }


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A"},
        {"question": "Q", "answer": "A"},
        {"instruction": "Q", "output": "A"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ],
)
def test_texts_of_every_format(row):
    assert texts_of(conversation_of(row, next(iter(row)))) == ["Q", "A"]


def test_texts_of_an_input_and_of_what_was_thought():
    assert texts_of(conversation_of({"instruction": "Q", "input": "I"}, "instruction")) == ["Q\nI"]
    answer = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    row = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, answer]}
    assert texts_of(conversation_of(row, "messages")) == ["S", "Q", "A", "R"]


def cohort(tmp_path, tiny_model, rows, tasks) -> CohortConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    students = [student_config(tiny_model, path).model_copy(update={"id": name}) for name in ("ann", "ben")]
    content = {"students": students, "evaluator": {"tasks": tasks}, "output": tmp_path / "run"}
    return CohortConfig.model_validate(content)


def generate_rows(count):
    return [{"prompt": each["instruction"], "completion": each["answer"]} for each in generate("test", count, seed=0)]


def test_a_cohort_that_trains_on_its_test_items_is_told_so(tiny_model, tmp_path):
    tests = generate("test", 40, seed=0)
    task = {"name": "other", "data": "other.jsonl", "question": "{q}", "answer": "{a}"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "other.jsonl").write_text(json.dumps({"q": "Who wrote Emma?", "a": "Austen"}) + "\n")
    other = str(tmp_path / "other.yaml")
    rows = [
        {"prompt": each["instruction"], "completion": each["answer"]} for each in (*tests, *generate("train", 9, 0))
    ]
    config = cohort(tmp_path, tiny_model, rows, ["arithmetic:paper", "arithmetic:loglik", {"task": other, "limit": 1}])
    found = findings_of_cohort(config)
    contained, other_task = found["ann"]
    assert found["ben"] == found["ann"]
    assert (contained.topic, contained.state, contained.exit_code) == ("test items", "note", 0)
    assert contained.text.startswith("arithmetic: 40 of 1,000 items (4.0%) are training rows word for word, 2 more ")
    assert f"{tmp_path / 'rows.jsonl'}, line 1" in contained.text
    assert tests[0]["instruction"][:40] in contained.text
    assert (other_task.state, other_task.text) == (
        "ok",
        f"{other}: no item (of 1) is a training row or shares 13 words in a row with one; 1 have fewer words, and are "
        "found word for word only",
    )

    limited = cohort(tmp_path, tiny_model, rows[5:], [{"task": "arithmetic", "limit": 5}])
    (clean,) = findings_of_cohort(limited)["ann"]
    assert (clean.state, "no item (of 5)" in clean.text) == ("ok", True)


def test_what_cannot_be_compared_is_said(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("TUTELAGE_DATA_DIR", raising=False)
    rows = [{"prompt": f"What is {i}?", "completion": "It."} for i in range(8)]
    config = cohort(tmp_path, tiny_model, rows, ["gsm8k:paper"])
    (finding,) = findings_of_cohort(config)["ann"]
    assert finding.state == "note"
    assert finding.text.startswith("not compared with the rows: ")
    assert "TUTELAGE_DATA_DIR" in finding.text

    one_more = cohort(tmp_path, tiny_model, generate_rows(4), ["gsm8k:paper", "arithmetic"])
    missing, there = findings_of_cohort(one_more)["ann"]
    assert missing.text.startswith("not compared with the rows: gsm8k: ")
    assert there.text.startswith("arithmetic: 4 of 1,000 items (0.4%) are training rows")

    broken = cohort(tmp_path, tiny_model, [*rows, {"completion": "It."}], ["arithmetic"])
    (finding,) = findings_of_cohort(broken)["ann"]  # the student refuses it
    assert "rows.jsonl, line 9: is missing" in finding.text
    assert findings_of_cohort(config.model_copy(update={"evaluator": None})) == {}


def test_of_a_stream_nothing_is_read(tiny_model, tmp_path):
    config = cohort(tmp_path, tiny_model, generate("test", 5, seed=0), ["arithmetic"])
    streamed = StudentConfig.model_validate(
        config.students[0].model_dump() | {"data": {"path": tmp_path / "rows.jsonl", "streaming": True}}
    )
    none, said = findings_of_cohort(config.model_copy(update={"students": (streamed,)}))["ann"]
    assert (none.state, said.state) == ("ok", "note")
    assert said.text == f"not compared with the rows: {tmp_path / 'rows.jsonl'} is streamed"


def test_a_run_says_it_first_and_its_report_has_it(tiny_model, tmp_path, monkeypatch, capsys):
    config = cohort(tmp_path, tiny_model, generate_rows(9), ["arithmetic"])
    (tmp_path / "cohort.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(supervisor, "supervise", lambda config, watch: [])
    monkeypatch.setattr(supervisor, "local_or_connected_ray", lambda config: nullcontext(""))
    assert train(["--config", str(tmp_path / "cohort.yaml")]) == 0
    said = capsys.readouterr().out
    assert said.count("· test items   arithmetic: 9 of 1,000 items (0.9%) are training rows") == 1  # of both students
    assert train(["--config", str(tmp_path / "cohort.yaml"), "--students", "ann"]) == 0  # the other's stay
    found = read_preflight(tmp_path / "run")
    assert [each["student"] for each in found] == ["ann", "ben"]
    assert (found[0]["topic"], found[0]["state"], found[0]["text"][:12]) == ("test items", "note", "arithmetic: ")


def test_a_text_without_spaces_is_said_to_be_found_word_for_word_only():
    item = "小明有三个苹果，又买了两个苹果，现在他一共有多少个苹果？"
    assert overlaps({"task": [item]}, [("a:1", [f"问{item}"])])["task"] == Overlap(1, 0, 0, None, short=1)


def test_items_of_tasks_are_printed(capsys):
    assert evaluate(["items", "--tasks", "arithmetic"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 1000
    assert lines[7] == {"task": "arithmetic", "item": "7", "text": generate("test", 8, seed=0)[7]["instruction"]}
