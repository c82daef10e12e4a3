"""Prompts to the letter, choices as lm-evaluation-harness makes them, the generated set, missing data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tutelage.data.rows import read_rows
from tutelage.errors import ConfigurationError, DataError, InvalidRequest, NotFound
from tutelage.evaluator.cli import main
from tutelage.evaluator.protocols.loglik import split_pair
from tutelage.evaluator.runner.requests import TaskRequest, parse_tasks
from tutelage.evaluator.tasks import TASKS, task_of_name
from tutelage.evaluator.tasks.arithmetic_generator import distractors, generate, split_of
from tutelage.evaluator.tasks.base import Item


def test_every_task_says_what_a_reader_needs() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert task.source
        assert task.count > 0
        assert 0 <= task.chance_level <= 0.5
        assert ("loglik" in task.protocols) == (task.choices is not None)
    assert TASKS["arithmetic"].chance("paper") == 0.0
    assert TASKS["arithmetic"].chance("loglik") == 0.25


def test_missing_data_is_refused_with_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gsm8k/test\.json.*LLM-Adapters.*TUTELAGE_DATA_DIR"):
        TASKS["gsm8k"].items(tmp_path)
    with pytest.raises(DataError, match="no data folder is set"):
        TASKS["gsm8k"].items(None)
    with pytest.raises(NotFound, match="arithmetic"):
        task_of_name("gsm8")


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tasks" / "gsm8k" / "test.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"question": "?"}]))
    with pytest.raises(DataError, match=re.escape(str(path))):
        TASKS["gsm8k"].items(tmp_path)


def _item(instruction: str, target: str) -> Item:
    return Item("0", instruction, "", target)


ARC = (
    "Please choose the correct answer to the question: Why?\n\nAnswer1: a b Answer2: c \n\n"
    "Answer format: answer1/answer2"
)


def test_choices_of_a_labelled_task() -> None:
    choices = TASKS["ARC-Easy"].choices(_item(ARC, "answer2"))
    assert choices.contexts == ("Question: Why?\nAnswer:",) * 2
    assert choices.continuations == (" a b", " c ")
    assert choices.lengths == (3, 2)
    assert choices.labels == ("answer1", "answer2")
    assert choices.gold == 1


def test_an_instruction_of_another_form_is_refused() -> None:
    with pytest.raises(DataError, match="does not read"):
        TASKS["ARC-Easy"].choices(_item("Why?", "answer1"))


def test_winogrande_scores_the_same_rest_after_both_names() -> None:
    text = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann paid Ben, so _ was "
        "glad.\n\nOption1: Ann Option2: Ben Answer format: option1/option2"
    )
    choices = TASKS["winogrande"].choices(_item(text, "option2"))
    assert choices.contexts == ("Ann paid Ben, so Ann", "Ann paid Ben, so Ben")
    assert choices.continuations == (" was glad.",) * 2


def test_hellaswag_is_cleaned_and_its_opening_capitalised() -> None:
    text = (
        "Please choose the correct ending to complete the given sentence: Roof: [header] How to mend [title] Climb. "
        "the man\n\nEnding1: [step] waits. Ending2: falls.\n\nAnswer format: ending1/ending2"
    )
    choices = TASKS["hellaswag"].choices(_item(text, "ending1"))
    assert choices.contexts[0] == "Roof: How to mend. Climb. The man"
    assert choices.continuations == ("  waits.", " falls.")


def test_boolq_and_aqua_and_piqa() -> None:
    boolq = "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false"
    assert TASKS["boolq"].choices(_item(boolq, "true")).contexts[0] == "Question: is it?\nAnswer:"
    aqua = TASKS["AQuA"].choices(_item("How many? Answer Choices: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5", "E"))
    assert aqua.continuations == (" 1", " 2", " 3", " 4", " 5")
    assert aqua.gold == 4
    text = "Please choose the correct solution to the question: How?\n\nSolution1: a\n\nSolution2: b\n\n"
    piqa = TASKS["piqa"].choices(_item(text + "Answer format: solution1/solution2", "solution1"))
    assert piqa.continuations == (" a", " b")


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.extraction and name != "arithmetic"])
def test_the_real_files_read_as_declared(name: str, data_dir: Path) -> None:
    task = TASKS[name]
    items = task.items(data_dir)
    assert len(items) == task.count
    assert len({item.item_id for item in items}) == task.count
    for item in items:
        if task.choices is not None:
            choices = task.choices(item)
            assert choices.labels[choices.gold] == item.target
            assert all(option.strip() for option in choices.continuations)
        else:
            float(item.target)
    assert task.items(data_dir, 3) == items[:3]


def test_arithmetic_is_right_and_ends_as_it_should() -> None:
    for record in generate("train", 500, 0):
        assert record["output"].endswith(f" The answer is {record['answer']}.")
        for left, operator, right, result in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", record["output"]):
            exact = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}[operator]
            assert exact(int(left), int(right)) == int(result)
            assert operator != "/" or int(left) % int(right) == 0
        assert record["output"].split(" The answer")[0].endswith(f"= {record['answer']}.")


def test_arithmetic_has_one_and_two_steps_and_all_operations() -> None:
    outputs = [record["output"] for record in generate("train", 500, 0)]
    assert any("Then" in output for output in outputs)
    assert any("Then" not in output for output in outputs)
    assert all(any(f" {operator} " in output for output in outputs) for operator in "+-*/")


def test_arithmetic_splits_share_no_numbers() -> None:
    def numbers(record: dict[str, str]) -> tuple[int, ...]:
        return tuple(sorted(int(number) for number in re.findall(r"\d+", record["instruction"])))

    train = {numbers(record) for record in generate("train", 3000, 1)}
    test = {numbers(record) for record in generate("test", 1000, 0)}
    assert not train & test
    assert all(split_of(one) == "train" for one in train)
    assert all(split_of(one) == "test" for one in test)


def test_arithmetic_is_the_seeds() -> None:
    assert generate("train", 50, 3) == generate("train", 200, 3)[:50]
    assert generate("train", 50, 3) != generate("train", 50, 4)
    questions = [record["instruction"] for record in generate("test", 1000, 0)]
    assert len(set(questions)) == 1000
    with pytest.raises(ConfigurationError, match="choose train or test"):
        generate("dev", 1, 0)
    with pytest.raises(ConfigurationError, match="50000"):
        generate("train", 0, 0)


def test_distractors_are_wrong_distinct_and_stable() -> None:
    for answer in range(200):
        wrong = distractors(answer, "key")
        assert len({*wrong, answer}) == 4
        assert min(wrong) >= 0
        assert wrong == distractors(answer, "key")


class SpaceTokenizer:
    """Tokens are words with the space before them."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in re.findall(r" ?[^ ]+", text)]


def test_pairs_are_split_as_the_harness_splits_them() -> None:
    tokenizer = SpaceTokenizer()
    assert split_pair(tokenizer, "a bb", " ccc") == ([1, 3], [4], False)
    assert split_pair(tokenizer, "a bb ", "ccc") == ([1, 3], [4], False)  # the space moves over
    with pytest.raises(InvalidRequest, match="no token"):
        split_pair(tokenizer, "a", "b")
    with pytest.raises(InvalidRequest, match="empty"):
        split_pair(tokenizer, " ", "b")


def test_task_lists() -> None:
    assert parse_tasks("arithmetic:paper, ARC-Easy:loglik", 5) == (
        TaskRequest("arithmetic", "paper", 5),
        TaskRequest("ARC-Easy", "loglik", 5),
    )
    assert len(parse_tasks("all", 0)) == sum(len(task.protocols) for task in TASKS.values() if task.extraction)
    with pytest.raises(InvalidRequest, match="TASK or TASK:PROTOCOL"):
        parse_tasks("arithmetic,", 0)


def test_names_of_the_harness_in_any_case_under_each_tasks_own_protocol() -> None:
    asked = parse_tasks("arc_easy,GSM8K,arc-challenge,social_iqa,boolq,aqua,svamp,dolly,arithmetic", 0)
    assert [f"{one.task}:{one.protocol}" for one in asked] == [
        "ARC-Easy:loglik",
        "gsm8k:paper",
        "ARC-Challenge:loglik",
        "social_i_qa:loglik",
        "boolq:loglik",
        "AQuA:loglik",
        "SVAMP:paper",
        "dolly:open",
        "arithmetic:paper",
    ]
    with pytest.raises(NotFound, match="did you mean ARC-Easy"):
        parse_tasks("arc_eazy", 0)


def test_a_share_of_the_items_is_rounded_up_as_the_harness_does() -> None:
    assert [one.limit for one in parse_tasks("arithmetic,arithmetic:loglik", 0.1)] == [100, 100]
    assert parse_tasks("arithmetic", 0.0015)[0].limit == 2
    assert parse_tasks("arithmetic", 1.0)[0].limit == 1
    with pytest.raises(DataError, match="gsm8k"):
        parse_tasks("gsm8k", 0.5, None)


def test_an_answer_may_be_the_place_of_a_choice(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "Which?", "options": ["a", "b"], "answer": 1}\n')
    own = tmp_path / "own.yaml"
    own.write_text(
        'name: own\ndata: rows.jsonl\nquestion: "{q}"\nanswer: "{options[answer]}"\n'
        'choices: ["{options[0]}", "{options[1]}"]\n'
    )
    task = task_of_name(str(own))
    (item,) = task.items(None)
    assert (item.target, task.choices(item).gold, task.default_protocol) == ("b", 1, "loglik")
    for wrong in ("{options[place]}", "{options[q]}", "{options[7]}", "{q.x}", "{other}", "{}"):
        own.write_text(f'name: own\ndata: rows.jsonl\nquestion: "{{q}}"\nanswer: "{wrong}"\n')
        with pytest.raises(DataError, match=r"does not fill .*Its fields: q, options, answer"):
            task_of_name(str(own)).items(None)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_generated_problems_have_the_form_that_their_files_name_says(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"train{suffix}"
    assert main(["generate-arithmetic", "--count", "3", "--seed", "2", "--out", str(out)]) == 0
    assert [row.values for row in read_rows(out)] == generate("train", 3, 2)
    with pytest.raises(DataError, match=r"train\.txt is none of"):
        main(["generate-arithmetic", "--out", str(tmp_path / "train.txt")])
