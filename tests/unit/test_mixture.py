"""Several data sets in proportion: shares, order, streams, held-out rows, and what `datasets` reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tutelage.data.rows import Part, is_dataset, read_rows
from tutelage.errors import ConfigurationError, DataError
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.mixture import WINDOW, Mixture, Shuffled, Stream
from tutelage.trainer.training.sources import read_data

WEIGHTS = (5.0, 2.0, 1.0)


class Named:
    """A data set whose n-th example is (its name, n)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def take(self, drawn: int, count: int) -> list[tuple[str, int]]:
        return [(self.name, number) for number in range(drawn, drawn + count)]


def test_shares_are_the_weights_within_sampling_error_over_ten_thousand_draws():
    mixture = Mixture([Named(name) for name in "abc"], WEIGHTS, seed=3)
    drawn = mixture.take(0, 10_000)
    for index, (name, weight) in enumerate(zip("abc", WEIGHTS, strict=True)):
        share = weight / sum(WEIGHTS)
        found = sum(each == name for each, _ in drawn) / 10_000
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 10_000)
        assert mixture.shares(10_000)[index] == pytest.approx(found)
        # Each gives its own rows one after the other, none twice and none left out.
        assert [number for each, number in drawn if each == name] == list(range(round(found * 10_000)))


def test_a_mixture_goes_on_from_any_place_and_depends_on_the_seed():
    def mixture(seed: int = 3) -> Mixture:
        return Mixture([Named(name) for name in "abc"], WEIGHTS, seed)

    whole = mixture().take(0, 9000)
    for start in (0, 1, 4095, 4096, 8500):
        assert mixture().take(start, 300) == whole[start : start + 300]
    assert mixture(4).take(0, 100) != whole[:100]
    assert mixture().shares(1) == [float(whole[0][0] == name) for name in "abc"]


def test_a_stream_gives_every_row_once_a_pass_and_goes_on_from_any_place():
    size = WINDOW + 500

    def rows():
        return iter(range(size))

    whole = Stream(rows, seed=1).take(0, 2 * size)
    assert sorted(whole[:WINDOW]) == list(range(WINDOW))
    assert whole[:WINDOW] != list(range(WINDOW))
    # The second window holds the end of the first pass and the beginning of the next one.
    assert sorted(whole[WINDOW : 2 * WINDOW]) == sorted([*range(WINDOW, size), *range(2 * WINDOW - size)])
    for start in (0, 7, WINDOW - 1, WINDOW, size, 2 * WINDOW + 3):
        assert Stream(rows, seed=1).take(start, 20) == whole[start : start + 20]
    again = Stream(rows, seed=1)
    assert again.take(WINDOW, 5) == whole[WINDOW : WINDOW + 5]
    assert again.take(3, 5) == whole[3:8]
    with pytest.raises(DataError, match="no row that fits"):
        Stream(lambda: iter(()), seed=1).take(0, 1)


def written(path: Path, word: str, count: int, **more: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{word} {number}", "completion": str(number), **more} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def config(tiny_model, data, **settings) -> StudentConfig:
    return StudentConfig.model_validate({"id": "ann", "init": tiny_model, "data": data, **settings})


def prompts(tokenizer, examples) -> list[str]:
    return [tokenizer.decode(example.prompt_ids) for example in examples]


def test_sources_have_templates_and_teachers_of_their_own_and_are_held_out_by_weight(tiny_model, tokenizer, tmp_path):
    sums = written(tmp_path / "sums.jsonl", "Ann", 30)
    talks = written(tmp_path / "talks.jsonl", "She", 30)
    own = written(tmp_path / "own.jsonl", "buys", 30, teacher="bob")
    data = [
        {"path": sums, "template": "plain", "weight": 2, "teacher": "math"},
        {"path": talks},
        {"path": own, "template": "plain", "teacher": "math"},
    ]
    read = read_data(config(tiny_model, data, held_out={"sequences": 8}), tokenizer)
    assert read.labels == ("0-sums", "1-talks", "2-own")
    assert read.rows == 82
    assert [text.split()[0] for text in prompts(tokenizer, read.held_out)] == ["Ann"] * 4 + ["<|im_start|>user"] * 2 + [
        "buys"
    ] * 2
    drawn = read.mixture.take(0, 60)
    texts = prompts(tokenizer, drawn)
    by_word = {text.split()[0]: example.teacher for text, example in zip(texts, drawn, strict=True)}
    assert by_word == {"Ann": "math", "<|im_start|>user": None, "buys": "bob"}


def test_one_source_is_what_it_was(tiny_model, tokenizer, tmp_path):
    from tutelage.trainer.data.dataset import Order, read_dataset

    path = written(tmp_path / "sums.jsonl", "Ann", 30)
    one = read_data(config(tiny_model, {"path": path}, held_out={"sequences": 4}, seed=5), tokenizer)
    whole = read_dataset(path, tokenizer, template="chat", max_tokens=512)
    rest, held = whole.split(held_out=4, seed=5)
    expected = [rest.examples[index] for index in Order(26, seed=5).take(3, 40)]
    assert prompts(tokenizer, one.mixture.take(3, 40)) == prompts(tokenizer, expected)
    assert prompts(tokenizer, one.held_out) == prompts(tokenizer, held)
    assert one.fingerprint == whole.fingerprint
    assert one.labels == ()


def test_a_data_set_of_their_own_to_measure_on(tiny_model, tokenizer, tmp_path):
    path, other = written(tmp_path / "sums.jsonl", "Ann", 10), written(tmp_path / "held.jsonl", "She", 5)
    settings = {"held_out": {"sequences": 9, "data": {"path": other, "template": "plain"}}}
    read = read_data(config(tiny_model, {"path": path, "template": "plain"}, **settings), tokenizer)
    assert prompts(tokenizer, read.held_out) == [f"She {number}" for number in range(5)]
    assert read.rows == 10


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_are_read_by_split_and_streams_hold_their_first_rows_out(streaming, tiny_model, tokenizer, tmp_path):
    folder = tmp_path / "folder"
    written(folder / "train.jsonl", "Ann", 20)
    written(folder / "test.jsonl", "She", 3)
    data = {"path": folder, "template": "plain", "streaming": streaming}
    read = read_data(config(tiny_model, data, held_out={"sequences": 2}), tokenizer)
    seen = set(prompts(tokenizer, read.mixture.take(0, 18)))
    assert seen <= {f"Ann {number}" for number in range(20)}
    assert seen.isdisjoint(prompts(tokenizer, read.held_out))
    assert [row.values["prompt"] for row in read_rows(folder, Part(split="test"))] == ["She 0", "She 1", "She 2"]
    assert next(read_rows(folder)).where == f"{folder} (train), row 1"


def test_what_datasets_does_not_find_is_named(tmp_path):
    written(tmp_path / "folder" / "train.jsonl", "Ann", 2)
    with pytest.raises(DataError, match=r"split valid: Unknown split"):
        list(read_rows(tmp_path / "folder", Part(split="valid")))
    with pytest.raises(DataError, match=r"configuration german: .*not found"):
        list(read_rows(tmp_path / "folder", Part("german")))
    with pytest.raises(DataError, match="is one file, which has no configuration"):
        list(read_rows(tmp_path / "folder" / "train.jsonl", Part(split="valid")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ann/sums", True), ("ann/sums-v2.5", True), ("sums", True), ("a/b.jsonl", False), ("rows.csv", False),
     ("/ann/sums", False), ("hf:/datasets", False), ("a/b/c", False)],
)  # fmt: skip
def test_names_on_the_hub_are_told_from_files(name, expected):
    assert is_dataset(Path(name)) is expected


def test_a_saved_data_set_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]).save_to_disk(tmp_path / "saved")
    assert [row.values for row in read_rows(tmp_path / "saved")] == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("data", "settings", "problem"),
    [
        ({"path": "a.jsonl", "template": "plain", "chat_template_kwargs": {"x": 1}}, {}, "is no chat template"),
        ({"path": "a", "streaming": True}, {"epochs": 1}, "no length"),
        ([], {}, "give either a path, or a list"),
        ({"path": "a.jsonl", "sources": [{"path": "b.jsonl"}]}, {}, "give either a path, or a list"),
        ({"path": "a.jsonl", "weight": 0}, {}, "greater than 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(data, settings, problem, tiny_model):
    with pytest.raises((ConfigurationError, ValueError), match=problem):
        config(tiny_model, data, **settings)


def test_what_stands_beside_several_sources_is_said_of_each(tiny_model):
    preset = "paper_recipe/math"
    several = config(tiny_model, [{"path": "a.jsonl"}, {"path": "b.jsonl", "template": "plain"}], preset=preset)
    assert [source.template for source in several.sources] == ["alpaca_leaked_indentation_training", "plain"]
    again = StudentConfig.model_validate(several.model_dump())
    assert again == several
    data = {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl", "turns": "all"}], "turns": "last", "teacher": "math"}
    assert [(each.turns, each.teacher) for each in config(tiny_model, data).sources] == [
        ("last", "math"),
        ("all", "math"),
    ]


def test_a_template_file_is_used_and_named_if_it_is_missing(tiny_model, tokenizer, tmp_path):
    path = written(tmp_path / "sums.jsonl", "Ann", 3)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    settings = {"held_out": {"sequences": 0}}
    read = read_data(
        config(tiny_model, {"path": path, "chat_template": str(tmp_path / "own.jinja")}, **settings), tokenizer
    )
    assert prompts(tokenizer, read.mixture.take(0, 1))[0].startswith("[Ann")
    with pytest.raises(ConfigurationError, match=r"cannot read .*gone\.jinja"):
        read_data(config(tiny_model, {"path": path, "chat_template": "gone.jinja"}, **settings), tokenizer)


def test_shuffled_orders_of_several_sources_differ(tokenizer, tmp_path):
    from tutelage.trainer.data.dataset import read_dataset

    dataset = read_dataset(written(tmp_path / "a.jsonl", "Ann", 20), tokenizer, template="plain", max_tokens=50)
    one, two = (prompts(tokenizer, Shuffled(dataset, 0, (index,)).take(0, 20)) for index in range(2))
    assert one != two
    assert sorted(one) == sorted(two)
