"""`tutelage teacher write`: what the teacher writes becomes a data set, filtered, in order, and resumable."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from fake_teacher import VOCABULARY_SIZE, FakeGenerationEngine, fake_teacher, serving
from tutelage.config import validate
from tutelage.data.conversations import format_of, with_completion
from tutelage.data.dataset_files import read_conversations, read_examples
from tutelage.errors import ConfigurationError, DataError, IdentityMismatch, InvalidRequest, Unreachable
from tutelage.identity import tokenizer_digests
from tutelage.teacher_server.config import GenerateConfig
from tutelage.teacher_server.engine.base import CompletionDelta
from tutelage.teacher_server.jobs.generate import Counts, generate_rationales


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Word n is id n; 0 stands for all that is no word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<end>": 0} | {str(number): number for number in range(1, VOCABULARY_SIZE)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)
    return folder


class Author(FakeGenerationEngine):
    """Writes "so it is", and last prompt token + sample; prompts that end on 9 it never ends."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.seeds: set[int] = set()
        self.stop_after = 10**6

    async def generate(self, prompt_token_ids, sampling):
        if len(self.asked) == self.stop_after:
            self.dead = True
            raise Unreachable("the teacher's engine is dead")
        self.asked.append(tuple(prompt_token_ids))
        self.seeds.add(sampling.seed)
        for sample in range(sampling.samples):
            yield CompletionDelta(sample, [1], " so it is", "")
            reason = "length" if prompt_token_ids[-1] % 10 == 9 else "stop"
            yield CompletionDelta(sample, [2], f" {prompt_token_ids[-1] + sample}", reason)


def rows(count: int = 25) -> list[dict[str, object]]:
    return [{"prompt": f"3 5 {number}", "answer": f"#### {number}.0"} for number in range(count)]


def config(folder: Path, tokenizer: Path, content=None, **values) -> GenerateConfig:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in content or rows()))
    given = {"data": data, "out": folder / "out.jsonl", "tokenizer": tokenizer, "template": "plain"}
    return validate(GenerateConfig, {**given, "max_new_tokens": 8, "samples": 2, "temperature": 0.7, **values})


def run(settings: GenerateConfig, author: Author, digests: dict[str, str] | None = None) -> tuple[Counts, list]:
    told = []

    async def serve() -> Counts:
        teacher = fake_teacher(generation=author, max_sequence_tokens=40)
        teacher.info.tokenizer_digests.update(digests or tokenizer_digests(settings.tokenizer))
        async with serving(teacher) as server:
            asked = settings.model_copy(update={"address": server.address})
            return await asyncio.to_thread(generate_rationales, asked, lambda *done: told.append(done))

    return asyncio.run(serve()), told


def written(settings: GenerateConfig) -> list[dict[str, object]]:
    return [json.loads(line) for line in settings.out.read_text().splitlines()]


def test_prompts_become_a_data_set_in_their_order(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    settings, author = config(tmp_path, tokenizer), Author()
    counts, told = run(settings, author)
    assert counts == Counts(prompts=25, generated=50, cut_off=4, kept=46)
    expected = [
        {
            "prompt": f"3 5 {number}",
            "answer": f"#### {number}.0",
            "completion": f" so it is {number + sample}",
            "sample": sample,
        }
        for number in range(25)
        if number % 10 != 9
        for sample in range(2)
    ]
    assert written(settings) == expected
    assert told[-1] == (25, 25)
    assert len(author.seeds) == 25
    assert not list(tmp_path.glob("*.part"))
    examples = read_examples(settings.out, AutoTokenizer.from_pretrained(tokenizer), template="plain")
    assert [example.prompt_ids.tolist() for example in examples[:3]] == [[3, 5, 0], [3, 5, 0], [3, 5, 1]]


def test_a_teacher_that_is_told_more_is_asked_with_that_and_the_student_reads_its_own_prompt(tokenizer, tmp_path):
    given = [{"prompt": "3 5 7", "teacher_prompt": "3 5 7 11"}, {"prompt": "3 5 8"}]
    settings, author = config(tmp_path, tokenizer, given, samples=1), Author()
    run(settings, author)
    assert sorted(author.asked) == [(3, 5, 7, 11), (3, 5, 8)]
    assert [(row["prompt"], row["completion"]) for row in written(settings)] == [
        ("3 5 7", " so it is 11"),
        ("3 5 8", " so it is 8"),
    ]


def test_a_chat_template_of_ones_own_and_what_it_is_given(tokenizer, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ first }}{% for message in messages %} {{ message.content }}{% endfor %} 12")
    chat = {"template": "chat", "chat_template": template, "chat_template_kwargs": {"first": "2"}}
    settings, author = config(tmp_path, tokenizer, [{"prompt": "3"}], teacher_system="4", **chat), Author()
    run(settings, author)
    assert author.asked == [(2, 4, 3, 12)]
    template.write_text("{{ first }}{% for message in messages %} {{ message.content }}{% endfor %} 13")
    with pytest.raises(ConfigurationError, match="chat_template"):
        run(settings, Author())


def test_only_right_answers_are_kept_if_that_is_asked(tokenizer, tmp_path):
    settings = config(tmp_path, tokenizer, answer_pattern=r"[0-9.]+")
    counts, _ = run(settings, Author())
    assert (counts.kept, counts.wrong, counts.cut_off) == (23, 23, 4)
    assert {row["sample"] for row in written(settings)} == {0}


@pytest.mark.parametrize(
    ("answer", "kept"), [("7", 1), ("7.0", 1), ("#### 7", 0), ("it is 7", 1), (7, 1), ("8", 0), ("seven", 0)]
)
def test_answers_are_compared_as_numbers_where_they_are(answer, kept, tokenizer, tmp_path):
    settings = config(
        tmp_path, tokenizer, [{"prompt": "7", "answer": answer}], samples=1, temperature=0, answer_pattern=r"is (\d+)$"
    )
    counts, _ = run(settings, Author())
    assert counts.kept == kept


def test_an_interrupted_run_goes_on_where_it_was(tokenizer, tmp_path):
    settings, author = config(tmp_path, tokenizer, prompts_at_once=1), Author()
    author.stop_after = 10
    with pytest.raises(Unreachable):
        run(settings, author)
    assert not settings.out.exists()
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(part.read_bytes() + b'[24, [{"text": "torn')
    again = Author()
    counts, told = run(settings, again)
    assert told[0] == (10, 25)
    assert len(again.asked) == 15
    assert not set(again.asked) & set(author.asked)
    (tmp_path / "undisturbed").mkdir()
    undisturbed = config(tmp_path / "undisturbed", tokenizer)
    assert counts == run(undisturbed, Author())[0]
    assert written(settings) == written(undisturbed)


@pytest.mark.parametrize("change", [{"seed": 1}, {"content": rows(24)}, {"top_p": 0.5}])
def test_what_was_begun_otherwise_is_not_gone_on_with(change, tokenizer, tmp_path):
    author = Author()
    author.stop_after = 3
    with pytest.raises(Unreachable):
        run(config(tmp_path, tokenizer, prompts_at_once=1), author)
    with pytest.raises(ConfigurationError, match="begun with other prompts, settings"):
        run(config(tmp_path, tokenizer, **change), Author())


OTHER_SETTINGS = [
    ({"seed": 1}, "seed"),
    ({"temperature": 0.5}, "temperature"),
    ({"answer_pattern": "[0-9]+"}, "answer_pattern"),
    ({"content": rows(24)}, "prompts"),
]


@pytest.mark.parametrize(("change", "named"), OTHER_SETTINGS)
def test_a_finished_data_set_is_not_replaced_by_one_made_otherwise(change, named, tokenizer, tmp_path):
    settings = config(tmp_path, tokenizer)
    run(settings, Author())
    before, author = settings.out.read_bytes(), Author()
    with pytest.raises(ConfigurationError, match=rf"out: .*{named}.*choose another out"):
        run(config(tmp_path, tokenizer, **change), author)
    assert settings.out.read_bytes() == before
    assert author.asked == []


def test_a_finished_data_set_is_not_made_again(tokenizer, tmp_path):
    settings = config(tmp_path, tokenizer)
    counts, _ = run(settings, Author())
    before, author = settings.out.read_bytes(), Author()
    again, told = run(settings, author)
    assert (again, told[-1], author.asked) == (counts, (25, 25), [])
    assert settings.out.read_bytes() == before


def test_a_file_that_says_nothing_of_how_it_was_made_is_not_replaced(tokenizer, tmp_path):
    settings = config(tmp_path, tokenizer)
    settings.out.write_text("mine\n")
    with pytest.raises(ConfigurationError, match="choose another out"):
        run(settings, Author())
    assert settings.out.read_text() == "mine\n"


def test_rows_keep_the_first_ones_form(tokenizer, tmp_path):
    content = [{"prompt": "3 5"}, {"prompt": "3 6", "messages": "a note"}]
    settings = config(tmp_path, tokenizer, content, samples=1)
    assert run(settings, Author())[0].kept == 2
    assert [row["prompt"] for row in written(settings)] == ["3 5", "3 6"]


def test_prompts_may_lie_on_the_hub(tokenizer, tmp_path, monkeypatch):
    settings = config(tmp_path, tokenizer)
    path = settings.data
    for module in ("rows", "hub"):
        monkeypatch.setattr(f"tutelage.data.{module}.local_file", lambda _: path)
    monkeypatch.setattr("tutelage.teacher_server.jobs.generate.local_file", lambda _: path, raising=False)
    settings = settings.model_copy(update={"data": Path("hf://datasets/owner/name/prompts.jsonl")})
    assert run(settings, Author())[0].kept == 46


def test_a_full_teacher_is_asked_again(tokenizer, tmp_path, monkeypatch):
    from tutelage.errors import Overloaded

    refusals = [0] * 5

    class Busy(Author):
        async def generate(self, prompt_token_ids, sampling):
            if refusals:
                refusals.pop()
                raise Overloaded("full", retry_after_milliseconds=1)
            async for piece in super().generate(prompt_token_ids, sampling):
                yield piece

    assert run(config(tmp_path, tokenizer), Busy())[0].kept == 46
    assert not refusals


def test_what_cannot_be_written_is_said(tokenizer, tmp_path):
    long = [{"prompt": " ".join(["1"] * 33)}, {"prompt": "1 2"}]
    settings = config(tmp_path, tokenizer, long)
    assert run(settings, Author())[0] == Counts(prompts=2, no_room=1, generated=2, kept=2)
    with pytest.raises(InvalidRequest, match="samples"):
        run(config(tmp_path, tokenizer, samples=5, out=tmp_path / "x.jsonl"), Author())
    with pytest.raises(IdentityMismatch, match="vocabulary"):
        run(config(tmp_path, tokenizer, out=tmp_path / "x.jsonl"), Author(), {"vocabulary": "other"})
    with pytest.raises(DataError, match=r"row 1 .* has no 'solution'"):
        run(config(tmp_path, tokenizer, answer_pattern="x", answer_column="solution"), Author())
    with pytest.raises(ConfigurationError, match="no pattern"):
        run(config(tmp_path, tokenizer, answer_pattern="("), Author())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "old"}, {"prompt": "p", "completion": "new"}),
        ({"question": "q", "answer": "right"}, {"prompt": "q", "completion": "new", "answer": "right"}),
        ({"instruction": "i", "output": "old"}, {"instruction": "i", "output": "new"}),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "old"}]},
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "new"}]},
        ),
        (
            {"messages": [{"role": "user", "content": "u"}]},
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "new"}]},
        ),
    ],
)
def test_every_form_takes_a_completion(row, expected):
    assert with_completion(row, format_of(row), "new") == expected
    notes = {"id": 7, "source": {"set": "x"}}
    assert with_completion(row | notes, format_of(row), "new") == expected | notes


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_data_set_has_the_form_that_its_name_says_and_the_rows_columns(suffix, tokenizer, tmp_path):
    content = [
        {"question": f"3 5 {n}", "answer": f"#### {n}", "id": n} | ({"source": "x"} if n else {}) for n in (0, 1)
    ]
    settings = config(tmp_path, tokenizer, content, samples=1, out=tmp_path / f"out{suffix}")
    assert run(settings, Author())[0].kept == 2
    read = [row for row, _ in read_conversations(settings.out)]
    assert [(row["prompt"], row["completion"], row["answer"], row["id"]) for row in read] == [
        ("3 5 0", " so it is 0", "#### 0", 0),
        ("3 5 1", " so it is 1", "#### 1", 1),
    ]
    assert [row.get("source") for row in read] == [None, "x"]


@pytest.mark.parametrize(
    ("name", "column", "says"),
    [
        ("out.csv", ["x", "y"], r"out\.csv is none of \.jsonl, \.json, \.parquet"),
        ("out", ["x", "y"], r"none of"),
        ("out.parquet", ["x", 7], r"column: .*out\.parquet cannot hold these rows.*write \.jsonl"),
    ],
)
def test_a_form_that_the_rows_cannot_have_is_refused_before_anything_is_generated(
    name, column, says, tokenizer, tmp_path
):
    content = [{"prompt": "3 5", "column": value} for value in column]
    author = Author()
    with pytest.raises(DataError, match=says):
        run(config(tmp_path, tokenizer, content, out=tmp_path / name), author)
    assert author.asked == []


def test_a_column_that_json_has_no_form_for_is_refused_before_anything_is_generated(tokenizer, tmp_path):
    import datetime

    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["3 5"], "made": [datetime.date(2026, 1, 1)]})
    parquet.write_table(table, tmp_path / "prompts.parquet")
    settings, author = config(tmp_path, tokenizer, samples=1), Author()
    with pytest.raises(DataError, match=r"date is not JSON serializable; leave the column out, or write \.parquet"):
        run(settings.model_copy(update={"data": tmp_path / "prompts.parquet"}), author)
    assert author.asked == []
    kept = settings.model_copy(update={"data": tmp_path / "prompts.parquet", "out": tmp_path / "out.parquet"})
    assert run(kept, author)[0].kept == 1
    assert read_conversations(kept.out)[0][0]["made"] == datetime.date(2026, 1, 1)


SETTINGS_DAMAGE = [b"", b"{", b"[]", b"\xff", b'{"settings": 3, "counts": {}}', b'{"settings": {}, "counts": {"x": 1}}']


@pytest.mark.parametrize("content", SETTINGS_DAMAGE)
def test_damaged_settings_of_a_finished_data_set_are_refused_in_words(content, tokenizer, tmp_path):
    settings = config(tmp_path, tokenizer)
    run(settings, Author())
    before = settings.out.read_bytes()
    (tmp_path / "out.jsonl.settings.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"out\.jsonl\.settings\.json is damaged .*remove it and"):
        run(settings, Author())
    assert settings.out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "content", "says"),
    [
        (0, b"{", "remove it, or"),
        (0, b"[1]", "remove it, or"),
        (0, b"\xff", "remove it, or"),
        (2, b"torn", "remove its line 3, whose prompt"),
        (2, b"[1]", "remove its line 3, whose prompt"),
        (2, b'[1, [{"text": "x"}]]', "remove its line 3, whose prompt"),
        (2, b"7", "remove its line 3, whose prompt"),
    ],
)
def test_a_damaged_journal_is_refused_in_words_and_its_advice_works(line, content, says, tokenizer, tmp_path):
    settings, author = config(tmp_path, tokenizer, prompts_at_once=1), Author()
    author.stop_after = 3
    with pytest.raises(Unreachable):
        run(settings, author)
    part = tmp_path / "out.jsonl.part"
    lines = part.read_bytes().split(b"\n")
    part.write_bytes(b"\n".join([*lines[:line], content, *lines[line + 1 :]]))
    with pytest.raises(ConfigurationError, match=rf"out\.jsonl\.part is damaged .*{says}"):
        run(settings, Author())
    if line:
        part.write_bytes(b"\n".join([*lines[:line], *lines[line + 1 :]]))
    else:
        part.unlink()
    assert run(settings, Author())[0].kept == 46
