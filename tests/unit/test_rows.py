"""One reader of data files: what trainer, teacher, evaluator and study make of the same lines, and of broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tutelage.data.dataset_files import read_conversations
from tutelage.errors import DataError, TutelageError
from tutelage.evaluator.tasks import TASKS, custom, task_of_name

SEPARATORS = "one\u2028two\u2029three\x85four"


def task_file(folder: Path, content: bytes) -> Path:
    """A task of one's own over these lines."""
    (folder / "rows.jsonl").write_bytes(content)
    described = {"name": "own", "data": "rows.jsonl", "question": "{prompt}", "answer": "{completion}"}
    (folder / "own.yaml").write_text(json.dumps(described))
    return folder / "own.yaml"


def read_as_trainer(folder: Path, content: bytes) -> list[tuple[str, str]]:
    (folder / "rows.jsonl").write_bytes(content)
    read = read_conversations(folder / "rows.jsonl")
    return [(conversation.messages[-1]["content"], conversation.completion) for _, conversation in read]


def read_as_custom_task(folder: Path, content: bytes) -> list[tuple[str, str]]:
    items = task_of_name(str(task_file(folder, content))).items(None)
    return [(item.instruction, item.target) for item in items]


def read_as_instruction_task(folder: Path, content: bytes) -> list[tuple[str, str]]:
    (folder / "instruct").mkdir()
    content = content.replace(b'"prompt"', b'"instruction"').replace(b'"completion"', b'"input": "", "output"')
    (folder / "instruct" / "dolly.valid.jsonl").write_bytes(content)
    return [(item.instruction, item.target) for item in TASKS["dolly"].items(folder)]


READERS = pytest.mark.parametrize(
    "read", [read_as_trainer, read_as_custom_task, read_as_instruction_task], ids=["trainer", "custom", "instruct"]
)


def line(prompt: str, **changes: str) -> bytes:
    return json.dumps({"prompt": prompt, "completion": "b", **changes}, ensure_ascii=False).encode()


@READERS
@pytest.mark.parametrize(
    "content",
    [
        line(SEPARATORS) + b"\n",
        b"\xef\xbb\xbf" + line(SEPARATORS),
        b"\n  \n" + line(SEPARATORS) + b"\r\n\r\n",
        json.dumps({"prompt": SEPARATORS, "completion": "b"}).encode() + b"\n",
    ],
    ids=["raw separators", "byte-order mark", "blank lines", "escaped separators"],
)
def test_everybody_reads_the_same_rows(read, content, tmp_path):
    assert read(tmp_path, content) == [(SEPARATORS, "b")]


@READERS
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("é".encode("latin-1"), r"line 2: is not UTF-8 \(byte 0xe9, number 1\); convert the file"),
        (b'{"prompt": "\xe9", "completion": "b"}', r"line 2: is not UTF-8 \(byte 0xe9"),
        (b"{oops", "line 2: is not JSON"),
        (b"[1]", "line 2: holds list"),
        (b'{"prompt": "a", "completion": "\\ud83d"}', r"line 2: holds half of a surrogate pair \(U\+D83D\)"),
        (b'{"prompt": "a\\uDE00", "completion": "b"}', r"line 2: holds half of a surrogate pair \(U\+DE00\)"),
    ],
)
def test_everybody_names_a_broken_line(read, content, says, tmp_path):
    with pytest.raises(DataError, match=says):
        read(tmp_path, line("a") + b"\n" + content + b"\n")


def test_half_of_a_pair_is_named_by_its_field_and_whole_pairs_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}]}\n'
    path.write_text(messages % "\\ud83d\\ude00")
    assert read_conversations(path)[0][1].messages[0]["content"] == "😀"
    path.write_text(messages % "\\ud83d")
    with pytest.raises(DataError) as refused:
        read_conversations(path)
    assert refused.value.field == "messages[0].content"


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a"}, "messages"),
        ({"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"instruction": "a"}, {"question": "a"}, "instruction"),
    ],
)
def test_rows_of_two_formats_are_refused(first, second, field, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    with pytest.raises(DataError, match=f"line 2: is missing.*all rows.*first.*{field}") as refused:
        read_conversations(path)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "content", [b'{"name": "own", "data": "gone.jsonl", "question": "q", "answer": "a"}', b"name: \xe9"]
)
def test_a_task_file_that_cannot_be_read_is_refused(content, tmp_path):
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(TutelageError, match=r"gone\.jsonl|own\.yaml"):
        custom.read_task(tmp_path / "own.yaml")
