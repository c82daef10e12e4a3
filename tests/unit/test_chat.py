"""Conversations by the chat templates of eight families: their token ids, and exactly which of them are learned from.

In an expected text ⟦…⟧ is what is learned from; all of it is what `apply_chat_template` gives, token for token, and
what stands after the last ⟧ is written by the template after the answer's end, and is not part of the sequence.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from chat_templates import FAMILIES, tokenizer_of_families
from tutelage.data.chat import Chat
from tutelage.data.conversations import BadRow, conversation_of, format_of
from tutelage.data.dataset_files import TokenizedExample, tokenizer_of
from tutelage.errors import DataError

S, U, A, T = ({"role": role} for role in ("system", "user", "assistant", "tool"))


def says(role: dict[str, str], content: str | None = None, **more: Any) -> dict[str, Any]:
    return {**role, "content": content, **more}


def calls(*named: tuple[str, Any], **more: Any) -> dict[str, Any]:
    made = [
        {"type": "function", "id": f"call{index:05}", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(named)
    ]
    return says(A, **{"content": "", "tool_calls": made, **more})


SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
TOOL_TEXT = json.dumps(TOOL)
HI = [says(U, "Hi"), says(A, "Hello.")]
TWO = [*HI, says(U, "Bye"), says(A, "See you.")]
THOUGHT = says(A, "4.", reasoning_content="2 and 2.")

# family, row (or its messages), settings, what comes of it
RIGHT: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "one turn": (
        "chatml", HI, {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n",
    ),
    "every turn": (
        "chatml", TWO, {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n",
    ),
    "the last turn": (
        "chatml", TWO, {"turns": "last"},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n",
    ),
    "a marked turn in the middle ends the sequence": (
        "chatml", [HI[0], says(A, "Hello.", train=True), *TWO[2:]], {"turns": "marked"},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n",
    ),
    "marked turns around one that is not": (
        "chatml",
        [HI[0], says(A, "One", train=True), U | {"content": "b"}, says(A, "Two", train=False), U | {"content": "c"},
         says(A, "Three", train=True)],
        {"turns": "marked"},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦One<|im_end|>⟧\n<|im_start|>user\nb<|im_end|>\n"
        "<|im_start|>assistant\nTwo<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        "⟦Three<|im_end|>⟧\n",
    ),
    "a system turn and unicode": (
        "chatml", [says(S, "Grüß dich 🙂"), says(U, "東京"), says(A, "は大きい。👩\u200d🔬")], {},
        "<|im_start|>system\nGrüß dich 🙂<|im_end|>\n<|im_start|>user\n東京<|im_end|>\n<|im_start|>assistant\n"
        "⟦は大きい。👩\u200d🔬<|im_end|>⟧\n",
    ),
    "an empty system turn and an empty question": (
        "chatml", [says(S, ""), says(U, ""), says(A, "Yes?")], {},
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n⟦Yes?<|im_end|>⟧\n",
    ),
    "an answer whose white space the template keeps": (
        "chatml", [says(U, "Hi"), says(A, "Hello. \n\n")], {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello. \n\n<|im_end|>⟧\n",
    ),
    "an answer that quotes the template": (
        "chatml", [says(U, "How?"), says(A, "By <|im_start|>user\nHi<|im_end|>\nthen.")], {},
        "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n⟦By <|im_start|>user\nHi<|im_end|>\nthen.<|im_end|>⟧"
        "\n",
    ),
    "two answers after another": (
        "chatml", [*HI, says(A, "And?")], {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>assistant\n"
        "⟦And?<|im_end|>⟧\n",
    ),
    "TRL's lists: answers of the prompt are not learned from": (
        "chatml", {"prompt": TWO[:3], "completion": TWO[3:]}, {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n",
    ),
    "TRL's lists: a completion of several turns": (
        "chatml", {"prompt": HI[:1], "completion": [HI[1], *TWO[2:]]}, {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n",
    ),
    "marks: every turn": (
        "chatml_marked", TWO, {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n",
    ),
    "marks: the last turn": (
        "chatml_marked", TWO, {"turns": "last"},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n",
    ),
    "marks: unicode next to them": (
        "chatml_marked", [says(U, "é"), says(A, "é🙂é")], {},
        "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n⟦é🙂é<|im_end|>⟧\n",
    ),
    "llama: every turn, trimmed": (
        "llama3", [says(S, " Be brief. "), says(U, "Hi\n"), says(A, " Hello. \n"), says(U, "Bye"), says(A, "See you.")],
        {},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟦Hello.<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦See you.<|eot_id|>⟧",
    ),
    "llama: a call, what the tool says, an answer": (
        "llama3",
        {"messages": [says(U, "1+2?"), calls(("add", {"a": 1, "b": 2})), says(T, "3"), says(A, "Three.")],
         "tools": [TOOL]},
        {},
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nTools: [{TOOL_TEXT}]<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"a": 1, "b": 2}}<|eom_id|>⟧<|start_header_id|>ipython<|end_header_id|>\n\n3'
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Three.<|eot_id|>⟧",
    ),
    "llama: a call is the answer": (
        "llama3", [says(U, "1+2?"), calls(("add", {"a": 1}), content=None)], {},
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦{\"name\": \"add\", \"parameters\": {\"a\": 1}}<|eom_id|>⟧",
    ),
    "gemma: every turn": (
        "gemma", TWO, {},
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦See you.<end_of_turn>⟧\n",
    ),
    "gemma: the last turn": (
        "gemma", TWO, {"turns": "last"},
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦See you.<end_of_turn>⟧\n",
    ),
    "mistral: every turn": (
        "mistral", TWO, {},
        "<s>[INST]Hi[/INST]⟦ Hello.</s>⟧[INST]Bye[/INST]⟦ See you.</s>⟧",
    ),
    "mistral: tools before the only question, a call with its id": (
        "mistral",
        {"messages": [says(U, "1+2?"), calls(("add", {"a": 1})), says(T, "3"), says(A, "Three.")], "tools": [TOOL]},
        {},
        f"<s>[AVAILABLE_TOOLS][{TOOL_TEXT}][/AVAILABLE_TOOLS][INST]1+2?[/INST]"
        '⟦[TOOL_CALLS]{"name": "add", "arguments": {"a": 1}, "id": "call00000"}</s>⟧'
        "[TOOL_RESULTS]3[/TOOL_RESULTS]⟦ Three.</s>⟧",
    ),
    "mistral: tools move with the last question, which the last turn does not mind": (
        "mistral", {"messages": TWO, "tools": [TOOL]}, {"turns": "last"},
        f"<s>[INST]Hi[/INST] Hello.</s>[AVAILABLE_TOOLS][{TOOL_TEXT}][/AVAILABLE_TOOLS][INST]Bye[/INST]"
        "⟦ See you.</s>⟧",
    ),
    "qwen: thoughts are learned from": (
        "qwen3", [says(U, "2+2?"), THOUGHT], {},
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n2 and 2.\n</think>\n\n4.<|im_end|>⟧\n",
    ),
    "qwen: without thoughts, a student that thinks learns to think nothing": (
        "qwen3", HI, {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello.<|im_end|>⟧\n",
    ),
    "qwen: told not to think": (
        "qwen3", HI, {"kwargs": {"enable_thinking": False}},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hello.<|im_end|>⟧\n",
    ),
    "qwen: a row that says so itself": (
        "qwen3", {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}}, {},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hello.<|im_end|>⟧\n",
    ),
    "qwen: past thoughts are the template's to leave out": (
        "qwen3", [says(U, "2+2?"), THOUGHT, says(U, "3+3?"), says(A, "6.", reasoning_content="3 twice.")],
        {"turns": "last"},
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n3 twice.\n</think>\n\n6.<|im_end|>⟧\n",
    ),
    "qwen: it thinks, calls twice, reads, thinks and answers": (
        "qwen3",
        {"messages": [says(S, "Count."), says(U, "1+2?"),
                      calls(("add", {"a": 1}), ("add", {"b": "é"}), reasoning_content="Ask."),
                      says(T, "3", name="add"), says(T, "4"), says(A, "Three.", reasoning_content="So 3.")],
         "tools": [TOOL]},
        {},
        f"<|im_start|>system\nCount.\n\n<tools>\n{TOOL_TEXT}\n</tools><|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nAsk.\n</think>\n\n\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
        '{"name": "add", "arguments": {"b": "é"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nSo 3.\n</think>\n\nThree.<|im_end|>⟧\n",
    ),
    "qwen: arguments and tools as JSON text": (
        "qwen3",
        {"messages": [says(U, "1+2?"), calls(("add", '{"a": 1}'), reasoning_content="Ask.")],
         "tools": json.dumps([TOOL])},
        {},
        f"<|im_start|>system\n<tools>\n{TOOL_TEXT}\n</tools><|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nAsk.\n</think>\n\n\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>⟧\n',
    ),
    "r1: answers without thoughts": (
        "r1", TWO, {},
        "<bos><|User|>Hi<|Assistant|>⟦Hello.</s>⟧<|User|>Bye<|Assistant|>⟦See you.</s>⟧",
    ),
    "zephyr: roles are no special tokens": (
        "zephyr", [says(S, "Be brief."), *TWO], {},
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n⟦Hello.</s>⟧\n<|user|>\nBye</s>\n<|assistant|>\n"
        "⟦See you.</s>⟧\n",
    ),
    "a template of one's own": (
        "chatml", TWO, {"template": FAMILIES["gemma"]},
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦See you.<end_of_turn>⟧\n",
    ),
    "of one's own, that does not rewrite": (
        "qwen3", [says(U, "2+2?"), says(A, "4."), *TWO[2:]], {"template": FAMILIES["chatml_marked"]},
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4.<|im_end|>⟧\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.<|im_end|>⟧\n",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return tokenizer_of_families(tiny_model)


def example_of(tokenizer, family: str, row: Any, turns: str = "all", **chat: Any) -> TokenizedExample:
    tokenizer.chat_template = FAMILIES[family]
    row = row if isinstance(row, dict) else {"messages": row}
    return tokenizer_of(tokenizer, "chat", Chat(**chat))(conversation_of(row, format_of(row), "rows, line 1", turns))


def learned_of(example: TokenizedExample) -> np.ndarray:
    own = np.arange(len(example.prompt_ids) + len(example.completion_ids)) >= len(example.prompt_ids)
    return own if example.mask is None else example.mask


def shown(tokenizer, ids: np.ndarray, mask: np.ndarray) -> str:
    """The text, with what is learned from in brackets."""
    edges = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    parts = [(tokenizer.decode(ids[a:b]), mask[a]) for a, b in pairwise(edges)]
    return "".join(f"⟦{text}⟧" if learned else text for text, learned in parts)


def test_the_table_is_large_enough():
    assert len(RIGHT) >= 30
    assert len({family for family, *_ in RIGHT.values()}) >= 6


@pytest.mark.parametrize("case", RIGHT)
def test_ids_are_apply_chat_templates_and_the_mask_is_right(case, tokenizer):
    family, row, settings, expected = RIGHT[case]
    example = example_of(tokenizer, family, row, **settings)
    ids = np.concatenate([example.prompt_ids, example.completion_ids])
    text, _, rest = expected.rpartition("⟧")
    assert shown(tokenizer, ids, learned_of(example)) == f"{text}⟧"
    # What the rest of the conversation is, `apply_chat_template` says as well; ids of texts are not put together again.
    given = row if isinstance(row, dict) else {"messages": row}
    messages = given.get("messages") or given["prompt"] + given["completion"]
    if settings.get("turns") == "marked":  # the sequence ends with the last turn that is learned from
        messages = messages[: max(index for index, each in enumerate(messages) if each.get("train")) + 1]
    messages = [
        {key: value for key, value in message.items() if key != "train"} | {"content": message["content"] or ""}
        for message in messages
    ]
    for message in messages:
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                message["tool_calls"] = [
                    {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
                ]
    tools = json.loads(given["tools"]) if isinstance(given.get("tools"), str) else given.get("tools")
    kwargs = settings.get("kwargs") or given.get("chat_template_kwargs", {})
    own = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=settings.get("template"), return_dict=False, **kwargs
    )
    assert ids.tolist() == own[: len(ids)]
    assert tokenizer.decode(own[len(ids) :]) == rest
    # And a student that writes the last answer itself is asked with what `apply_chat_template` asks.
    asked = tokenizer.apply_chat_template(
        messages[:-1],
        tools=tools,
        chat_template=settings.get("template"),
        add_generation_prompt=True,
        return_dict=False,
        **kwargs,
    )
    assert example.prompt_ids.tolist() == asked


# family, row, settings, the field, what is said
WRONG: dict[str, tuple[str, Any, dict[str, Any], str, str]] = {
    "a call that the template does not write": (
        "chatml", [says(U, "1+2?"), calls(("add", {"a": 1}))], {}, "messages[1].tool_calls[0].function.name", "lost"),
    "tools that the template does not write": (
        "chatml", {"messages": HI, "tools": [TOOL]}, {}, "tools[0].function.name", "lost"),
    "thoughts that the template does not write": (
        "chatml", [says(U, "2+2?"), THOUGHT], {}, "messages[1].reasoning_content", "lost"),
    "thoughts under another name than the template's": (
        "qwen3", [says(U, "2+2?"), says(A, "4.", thinking="2 and 2.")], {}, "messages[1].thinking", "lost"),
    "past thoughts under a template that never writes them are left out all the same": (
        "chatml", [says(U, "2+2?"), THOUGHT, *HI], {"turns": "all"}, "messages[1].reasoning_content", "lost"),
    "a speaker's name": (
        "chatml", [says(U, "Hi", name="Ann"), says(A, "Hello.")], {}, "messages[0].name", "lost"),
    "a text beside a call": (
        "llama3", [says(U, "1+2?"), calls(("add", {}), content="Let me see.")], {}, "messages[1].content", "lost"),
    "a system turn that vanishes": ("mistral", [says(S, "Be brief."), *HI], {}, "messages[0].content", "lost"),
    "a template that has no system role": ("gemma", [says(S, "Be brief."), *HI], {}, "messages", "no system role"),
    "a template that wants turns in order": ("gemma", [HI[0], *HI], {}, "messages", "roles must alternate"),
    "two calls where one is allowed": (
        "llama3", [HI[0], calls(("add", {}), ("add", {}))], {}, "messages", "one call at a time"),
    "a history that is rewritten": (
        "qwen3", [says(U, "2+2?"), says(A, "4."), *HI], {}, "messages[1]",
        r"written otherwise.*'4\.<\|im_end.*<think>.*data\.turns: last"),
    "tools that move": (
        "mistral", {"messages": TWO, "tools": [TOOL]}, {}, "messages[1]", r"AVAILABLE_TOOLS.*data\.turns: last"),
    "an answer of which a part is kept": (
        "r1", [says(U, "2+2?"), says(A, "<think>2 and 2.</think>4.")], {}, "messages[1].content",
        "keeps a part of it; thoughts belong into reasoning_content"),
    "an answer that begins in the middle of a token": (
        "chatml", [says(U, "Hi"), says(A, "Ann")], {"template": SPACED}, "messages[1]", "joined by the tokenizer"),
    "told not to think, with thoughts": (
        "qwen3", [says(U, "2+2?"), THOUGHT], {"kwargs": {"enable_thinking": False}}, "messages[1]",
        "written otherwise"),
    "a setting that the template does not know": (
        "chatml", HI, {"kwargs": {"enable_thinking": False}}, "data.chat_template_kwargs", "enable_thinking"),
    "an empty turn in the middle": (
        "chatml", [says(U, "Hi"), says(A, ""), *HI], {}, "messages[1].content", "teach to end at once"),
    "the assistant begins": ("chatml", [says(A, "Hi"), *HI], {}, "messages", "what does it answer"),
    "nothing marked": ("chatml", HI, {"turns": "marked"}, "messages", "train: true"),
    "marks that nobody looks at": (
        "chatml", [HI[0], says(A, "Hello.", train=False)], {}, "messages[1].train", "turns: marked"),
    "a role that nobody has": ("chatml", [{"role": "human", "content": "Hi"}, HI[1]], {}, "messages[0].role", "one of"),
    "TRL's lists with nothing to learn from": (
        "chatml", {"prompt": HI[:1], "completion": [says(U, "Hm.")]}, {}, "completion", "nothing to learn from"),
    "a list and a text": ("chatml", {"prompt": HI[:1], "completion": "Hello."}, {}, "completion", "expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_would_be_lost_or_learned_wrongly_is_refused_by_its_field(case, tokenizer):
    family, row, settings, field, problem = WRONG[case]
    with pytest.raises((DataError, BadRow), match=rf"(?s){problem}") as refused:
        example_of(tokenizer, family, row, **settings)
    error = refused.value
    assert (error.args[0] if isinstance(error, BadRow) else error.field) == field
    assert isinstance(error, BadRow) or "rows, line 1" in str(error)


def test_what_the_template_leaves_out_of_the_past_is_counted(tokenizer):
    row = [says(U, "2+2?"), THOUGHT, *HI]
    assert example_of(tokenizer, "qwen3", row, turns="last").left_out == ("messages[1].reasoning_content",)


def test_marks_that_do_not_tell_turns_apart_are_refused(tokenizer):
    template = FAMILIES["chatml_marked"].replace("{% if m.role == 'assistant' %}", "{% if loop.last %}")
    with pytest.raises(DataError, match=r"holds 2 turns.*marks 1"):
        example_of(tokenizer, "chatml", TWO, template=template)


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_templates_of_one_text_take_a_conversation_of_one_and_refuse_more(template, tokenizer):
    tokenized = tokenizer_of(tokenizer, template)
    example = tokenized(conversation_of({"messages": HI}, "messages"))
    assert tokenizer.decode(example.completion_ids) == "Hello.<|im_end|>"
    for row in ({"messages": HI, "tools": [TOOL]}, {"messages": [HI[0], THOUGHT]}):
        with pytest.raises(DataError, match=f"which the template {template} would not show"):
            tokenized(conversation_of(row, "messages"))
