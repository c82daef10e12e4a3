"""Where texts begin and end in tokens: once each, where the template and the teacher end them, and as it is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tutelage.data.dataset_files import read_examples
from tutelage.data.prompts import completion_end_id

ENDOFTEXT, IM_START, IM_END = 0, 1, 2


def tokenizer_with(folder: Path, model: Path, *, single: str = "", **special: str):
    """The tiny tokenizer with other special tokens, or with a post-processor that adds some."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if single:
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("single", "prompt", "expected"),
    [
        ("<|im_start|> $A", "Ann", [IM_START, "Ann"]),
        ("<|im_start|> $A", "<|im_start|>Ann", [IM_START, "Ann"]),
        ("$A <|im_end|>", "Ann", ["Ann"]),
        ("<|im_start|> $A <|im_end|>", "Ann", [IM_START, "Ann"]),
        ("<|im_start|> $A <|im_end|>", "<|im_start|>Ann", [IM_START, "Ann"]),
        ("", "<|im_start|>Ann", [IM_START, "Ann"]),
    ],
)
def test_a_prompt_begins_once_and_does_not_end(single, prompt, expected, tmp_path, tiny_model):
    tokenizer = tokenizer_with(tmp_path / "tokenizer", tiny_model, single=single)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "b"}))
    (example,) = read_examples(tmp_path / "rows.jsonl", tokenizer, template="plain")
    ids = [
        id_
        for part in expected
        for id_ in ([part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False))
    ]
    assert example.prompt_ids.tolist() == ids


@pytest.mark.parametrize(("template", "end"), [("chat", IM_END), ("plain", ENDOFTEXT), ("alpaca", ENDOFTEXT)])
@pytest.mark.parametrize("completion", ["b", "b<|im_end|>", "b<|endoftext|>"])
def test_a_completion_ends_once_with_the_token_by_which_its_template_closes_a_turn(
    template, end, completion, tmp_path, tiny_model
):
    tokenizer = tokenizer_with(tmp_path / "tokenizer", tiny_model, eos_token="<|endoftext|>")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": completion}))
    (example,) = read_examples(tmp_path / "rows.jsonl", tokenizer, template=template)
    own = tokenizer.encode(completion, add_special_tokens=False)
    assert example.completion_ids.tolist() == (own if own[-1] == end else [*own, end])


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.content | upper }}<|im_end|>{% endfor %}",
        "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_rewrites_or_drops_answers_does_not_say_what_ends_them(template, tmp_path, tiny_model):
    tokenizer = tokenizer_with(tmp_path / "tokenizer", tiny_model, eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    assert completion_end_id("chat", tokenizer) == ENDOFTEXT
