"""Data files in the forms that people have: token ids, truncation, order, and refusals by file, line, field."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import polars
import pytest
from transformers import AutoTokenizer

from tutelage.errors import DataError
from tutelage.trainer.data.dataset import Order, read_dataset


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def written(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        polars.DataFrame(rows).write_parquet(path)
    return path


FORMS = {
    "prompt": {"prompt": "Ann buys 3.", "completion": "Good."},
    "messages": {"messages": [{"role": "user", "content": "Ann buys 3."}, {"role": "assistant", "content": "Good."}]},
    "instruction": {"instruction": "Ann buys 3.", "input": "", "output": "Good.", "answer": "3"},
    "question": {"question": "Ann buys 3.", "answer": "Good."},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_file_gives_the_same_tokens(form, suffix, tokenizer, tmp_path):
    path = written(tmp_path / f"rows{suffix}", [FORMS[form]])
    (example,) = read_dataset(path, tokenizer, template="chat", max_tokens=200).examples
    assert tokenizer.decode(example.prompt_ids) == "<|im_start|>user\nAnn buys 3.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.completion_ids) == "Good.<|im_end|>"


def test_earlier_turns_are_prompt_and_a_last_user_turn_has_no_completion(tokenizer, tmp_path):
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    path = written(tmp_path / "rows.jsonl", [{"messages": turns}])
    (example,) = read_dataset(path, tokenizer, template="chat", max_tokens=200).examples
    assert tokenizer.decode(example.prompt_ids).count("<|im_start|>") == 4
    assert len(example.completion_ids) == 0


def test_truncation_is_counted_and_cuts_the_end(tokenizer, tmp_path):
    rows = [{"prompt": "Ann", "completion": "1 2 3 4 5 6 7 8 9"}, {"prompt": "Ann " * 60, "completion": "1"}]
    path = written(tmp_path / "rows.jsonl", rows)
    whole = read_dataset(path, tokenizer, template="plain", max_tokens=500)
    full = whole.examples[0]
    room = len(full.prompt_ids) + 4
    cut = read_dataset(path, tokenizer, template="plain", max_tokens=room)
    assert (cut.dropped_prompts, cut.truncated_completions) == (1, 1)
    assert cut.tokens_cut == len(full.completion_ids) - 4
    assert cut.examples[0].completion_ids.tolist() == full.completion_ids[:4].tolist()
    assert cut.fingerprint != whole.fingerprint
    lost = cut.tokens_cut
    assert cut.counts() == {"rows": 2, "dropped_prompts": 1, "truncated_completions": 1, "tokens_cut": lost}
    assert cut.cost_of_length(room) == (
        f"1 of 2 rows are left out: their prompt alone fills {room} tokens (batch.max_tokens)",
        f"1 of 2 completions lost their end, {lost} tokens together: with their prompt they have more than {room} "
        "(batch.max_tokens)",
    )
    assert whole.cost_of_length(500) == ()


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"prompt": 3}, "prompt", "expected a string"),
        ({"prompt": " "}, "prompt", "not empty"),
        ({"prompt": "a", "completion": ["b"]}, "completion", "expected a string"),
        ({"completion": "b"}, "prompt", "is missing"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(row, field, problem, tokenizer, tmp_path):
    path = written(tmp_path / "rows.jsonl", [FORMS["prompt"], row])
    with pytest.raises(DataError, match=problem) as caught:
        read_dataset(path, tokenizer, template="chat", max_tokens=200)
    assert caught.value.field == field
    assert f"{path}, line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.csv", "a,b", "none of .jsonl, .json, .parquet"),
        ("rows.jsonl", "", "holds no rows"),
        ("rows.jsonl", '{"prompt": "a"}\n{oops', "line 2: is not JSON"),
        ("rows.jsonl", "[1]", "line 1: holds list"),
        ("rows.jsonl", '{"text": "a"}', "none of messages, prompt, instruction, question"),
        ("rows.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "what does it answer"),
        ("rows.jsonl", '{"messages": [{"role": "user"}]}', "expected strings `role` and `content`"),
        ("rows.json", '{"prompt": "a"}', "expected a list of rows"),
        ("rows.parquet", "PAR", "not readable as Parquet"),
        ("missing.jsonl", None, "is not a file"),
    ],
)
def test_files_that_are_not_data_are_refused(name, content, problem, tokenizer, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=problem):
        read_dataset(tmp_path / name, tokenizer, template="chat", max_tokens=200)


def test_prompts_that_leave_no_room_are_an_error_if_all_do(tokenizer, tmp_path):
    path = written(tmp_path / "rows.jsonl", [FORMS["prompt"]])
    with pytest.raises(DataError, match=r"raise batch\.max_tokens"):
        read_dataset(path, tokenizer, template="chat", max_tokens=3)


def test_the_order_covers_each_epoch_once_and_goes_on_from_any_place():
    order = Order(7, seed=1)
    drawn = order.take(0, 21)
    assert [sorted(drawn[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert drawn[:7] != drawn[7:14]
    assert [index for start in range(0, 21, 3) for index in order.take(start, 3)] == drawn
    assert Order(7, seed=2).take(0, 7) != drawn[:7]


def test_held_out_rows_are_not_trained_on(tokenizer, tmp_path):
    path = written(tmp_path / "rows.jsonl", [{"prompt": f"Ann {i}", "completion": str(i)} for i in range(20)])
    whole = read_dataset(path, tokenizer, template="plain", max_tokens=50)
    rest, held = whole.split(held_out=5, seed=0)
    both = Counter(example.completion_ids.tobytes() for example in (*rest.examples, *held))
    assert len(held) == 5
    assert both == Counter(example.completion_ids.tobytes() for example in whole.examples)
    assert np.array_equal(whole.split(held_out=5, seed=0)[1][0].prompt_ids, held[0].prompt_ids)
    with pytest.raises(DataError, match="leave none to train on"):
        whole.split(held_out=20, seed=0)
