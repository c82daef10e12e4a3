"""A row that says more than a prompt and a completion is refused by the field that would be lost."""

from __future__ import annotations

import json

import pytest

from tutelage.data.conversations import Conversation
from tutelage.data.dataset_files import read_conversations, read_examples
from tutelage.data.prompts import prompt_text
from tutelage.errors import DataError

USER = {"role": "user", "content": "What is the weather?"}


def refusal(row, tmp_path) -> DataError:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, {"role": "assistant", "content": "Fine."}]}) + "\n")
    if "messages" not in row:
        path.write_text("")
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(DataError) as refused:
        read_conversations(path)
    assert str(path) in str(refused.value)
    return refused.value


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"content": "Fine.", "tool_calls": "weather"}, "messages[1].tool_calls"),
        ({"content": "", "tool_calls": [{"type": "function"}]}, "messages[1].tool_calls[0]"),
        ({"tool_calls": [{"name": "weather", "arguments": "{"}]}, "messages[1].tool_calls[0].arguments"),
        ({"tool_calls": [{"name": "weather", "arguments": "[1]"}]}, "messages[1].tool_calls[0].arguments"),
        ({"content": "Fine.", "function_call": {"name": "weather"}}, "messages[1].function_call"),
        ({"content": "Fine.", "reasoning_content": ["Clouds are few."]}, "messages[1].reasoning_content"),
        ({"content": "Fine.", "refusal": "No."}, "messages[1].refusal"),
        ({"content": ""}, "messages[1].content"),
        ({"content": " \n"}, "messages[1].content"),
        ({"content": [{"type": "text", "text": "Fine."}]}, "messages[1].content"),
        ({"content": "Fine.", "role": "function"}, "messages[1].role"),
        ({"content": "Fine.", "role": "Assistant"}, "messages[1].role"),
    ],
)
def test_what_an_answer_says_besides_its_text_is_refused(answer, field, tmp_path):
    row = {"messages": [USER, {"role": "assistant", **answer}]}
    assert refusal(row, tmp_path).field == field


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([{"role": "tool", "content": "sunny", "tool_call_id": 1}], "messages[1].tool_call_id"),
        ([{"role": "assistant", "content": None}], "messages[1].content"),
        ([{"role": "assistant", "content": " "}], "messages[1].content"),
        ([{"role": "user", "content": "Hm.", "thinking": "Clouds."}], "messages[1].thinking"),
        ([{"role": "human", "content": "x"}], "messages[1].role"),
    ],
)
def test_turns_before_the_answer_are_looked_at_as_well(turns, field, tmp_path):
    row = {"messages": [USER, *turns, {"role": "assistant", "content": "Fine."}]}
    assert refusal(row, tmp_path).field == field


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [USER, {"role": "assistant", "content": "Fine."}], "tools": ["weather"]}, "tools"),
        ({"messages": [USER, {"role": "assistant", "content": "Fine."}], "tools": "weather"}, "tools"),
        ({"messages": [USER], "chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs"),
        ({"prompt": "a", "completion": "b", "system": "Be brief."}, "system"),
        ({"instruction": "a", "output": "b", "history": [["x", "y"]]}, "history"),
        ({"prompt": "a", "completion": "b", "images": ["a.png"]}, "images"),
    ],
)  # fmt: skip
def test_what_a_row_says_besides_its_conversation_is_refused(row, field, tmp_path):
    assert refusal(row, tmp_path).field == field


def test_fields_without_a_value_and_notes_are_no_loss(tmp_path):
    path = tmp_path / "rows.jsonl"
    answer = {"role": "assistant", "content": "Fine.", "tool_calls": None, "reasoning_content": "", "id": 7}
    row = {"messages": [{"role": "system", "content": ""}, USER, answer], "tools": [], "system": None, "source": "x"}
    path.write_text(json.dumps(row))
    ((_, conversation),) = read_conversations(path)
    assert conversation.completion == {"role": "assistant", "content": "Fine."}
    assert conversation.tools is None
    assert conversation.messages == [{"role": "system", "content": ""}, USER]


@pytest.mark.parametrize("template", ["plain", "alpaca", "alpaca_leaked_indentation"])
def test_templates_of_one_turn_refuse_several(template, tmp_path, tiny_model):
    from transformers import AutoTokenizer

    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Fine."}]}
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1: .*2 messages.*{template}.*chat") as refused:
        read_examples(path, AutoTokenizer.from_pretrained(tiny_model), template=template)
    assert refused.value.field == "messages"


def test_the_plain_template_does_not_drop_an_instructions_input():
    with pytest.raises(DataError, match=r"input.*alpaca"):
        prompt_text("plain", Conversation([USER], None, "Berlin"), None)
