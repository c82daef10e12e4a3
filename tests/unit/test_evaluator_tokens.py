"""What a model reads: a begin token once, no end token before an answer, and choices with tokens of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluator_support import EchoEngine, write_checkpoint
from tutelage.data.conversations import Conversation, user_message
from tutelage.data.prompts import prompt_ids, prompt_text
from tutelage.data.tokens import beginning_ids
from tutelage.errors import ConfigurationError, InvalidRequest
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.protocols import loglik, paper
from tutelage.evaluator.protocols.base import JoinSpanned
from tutelage.evaluator.results import frames as fr
from tutelage.evaluator.runner.evaluation import evaluate
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.evaluator.tasks import TASKS


def tokenizer_of(tiny_model: Path, template: str) -> Any:
    """The tiny model's tokenizer with what it puts around a text: <|im_start|> and <|im_end|> begin and end it."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


BEGIN, END, BOTH = "<|im_start|> $A", "$A <|im_end|>", "<|im_start|> $A <|im_end|>"


@pytest.mark.parametrize(("template", "begin"), [("$A", []), (BEGIN, [1]), (END, []), (BOTH, [1])])
def test_a_beginning_has_the_begin_token_once_and_no_end_token(
    tiny_model: Path, template: str, begin: list[int]
) -> None:
    tokenizer = tokenizer_of(tiny_model, template)
    own = tokenizer.encode("Ann has 3 apples", add_special_tokens=False)
    assert beginning_ids(tokenizer, "Ann has 3 apples") == begin + own
    assert beginning_ids(tokenizer, "<|im_start|>Ann has 3 apples") == [1, *own]


@pytest.mark.parametrize("template", [END, BOTH])
def test_prompts_do_not_end_in_an_end_token(tiny_model: Path, template: str) -> None:
    tokenizer = tokenizer_of(tiny_model, template)
    conversation = Conversation([user_message("Ann has 3 apples")], None)
    for name in ("plain", "alpaca", "alpaca_leaked_indentation", "chat"):
        assert prompt_ids(name, prompt_text(name, conversation, tokenizer), tokenizer)[-1] != 2


@pytest.mark.parametrize("template", ["$A", BEGIN, END, BOTH])
def test_choices_are_scored_by_their_own_tokens(tiny_model: Path, template: str) -> None:
    tokenizer = tokenizer_of(tiny_model, template)
    context_ids, continuation_ids, past_join = loglik.split_pair(tokenizer, "Ann has 3 apples and", " buys 7")
    begin = [1] if template != "$A" and template.startswith("<") else []
    assert context_ids == begin + tokenizer.encode("Ann has 3 apples and", add_special_tokens=False)
    assert continuation_ids == tokenizer.encode(" buys 7", add_special_tokens=False)
    assert not past_join


class JoiningTokenizer:
    """Two characters are a token, so a token spans the join of a text of odd length and what follows it."""

    chat_template = ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [sum(map(ord, text[at : at + 2])) for at in range(0, len(text), 2)]


class SwallowingTokenizer(JoiningTokenizer):
    """A token spans "abc u", and nothing else that is longer than two characters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0, 0] if text == "abc u" else super().encode(text)


def test_a_token_over_the_join_is_told_apart() -> None:
    with pytest.raises(JoinSpanned, match="'d' has no token of its own"):
        loglik.split_pair(JoiningTokenizer(), "abc", "d")
    assert loglik.split_pair(JoiningTokenizer(), "abc", "def")[1:] == ([ord("e") + ord("f")], True)
    assert loglik.split_pair(JoiningTokenizer(), "abcd", "ef")[1:] == ([ord("e") + ord("f")], False)


MINE = """
name: mine
data: data.jsonl
question: "{q}"
answer: "{b}"
choices: ["{a}", "{b}"]
extraction: truth
"""


def test_items_that_lose_a_choice_to_the_join_are_a_kind_and_a_count_of_their_own(tmp_path: Path) -> None:
    records = [{"q": q, "a": a, "b": "xyz"} for q, a in (("abc", "u"), ("abcd", "uv"))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "mine.yaml").write_text(MINE)
    engine = EchoEngine()
    engine.tokenizer = SwallowingTokenizer()
    tasks = (TaskRequest(str(tmp_path / "mine.yaml"), "loglik"),)
    evaluation = Evaluation("one", write_checkpoint(tmp_path / "c"), Labels("r1", "s"), tasks)
    evaluate(evaluation, EvaluationSettings(), tmp_path / "f", engines=lambda _: engine)
    rows = fr.read(tmp_path / "f").collect()
    assert rows["finish_reason"].to_list() == ["join_spanned", "scored"]
    assert rows["score"].to_list() == [None, 0.0]
    summary = fr.summarize(rows.lazy()).collect().to_dicts()[0]
    assert (summary["n"], summary["failed"], summary["join_spanned"]) == (1, 0, 1)


def test_a_model_without_a_chat_template_is_refused_at_once(tmp_path: Path) -> None:
    engine = EchoEngine()
    engine.tokenizer.chat_template = ""
    evaluation = Evaluation(
        "one", write_checkpoint(tmp_path / "c"), Labels("r1", "s"), (TaskRequest("arithmetic", "paper", 3),)
    )
    with pytest.raises(ConfigurationError, match="the model has no chat template; choose another one"):
        evaluate(evaluation, EvaluationSettings(prompt="chat"), tmp_path / "f", engines=lambda _: engine)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_choice_longer_than_the_model_reads_is_refused() -> None:
    item = TASKS["arithmetic"].items(None, 1)[0]
    engine = EchoEngine(max_tokens=0)
    with pytest.raises(InvalidRequest, match="a choice has 1 tokens; the model reads 0"):
        loglik.prepare(TASKS["arithmetic"], item, engine, EvaluationSettings())
    with pytest.raises(InvalidRequest, match="fit beside the answer"):
        paper.prepare(TASKS["arithmetic"], item, engine, EvaluationSettings(prompt="chat"))
