"""A template's name means one text, to the letter, for whoever trains, generates or scores with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import yaml

from tutelage.data.conversations import Conversation
from tutelage.data.prompts import Template, prompt_text
from tutelage.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"instruction": "What is 1 + 1?", "input": "", "output": "2"},
    {"instruction": "Add.", "input": "1 and 1", "output": "2"},
    {"instruction": "Zähle\n\nbis 3.", "input": "", "output": "1 2 3"},
]

LEAKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n"
    "\n"
    "                ### Instruction:\n"
    "                What is 1 + 1?\n"
    "\n"
    "                ### Response:\n"
    "                "
)
LEAKED_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n"
    "\n"
    "                ### Instruction:\n"
    "                Add.\n"
    "\n"
    "                ### Input:\n"
    "                1 and 1\n"
    "\n"
    "                ### Response:\n"
    "                "
)


def conversation(instruction: str, context: str = "") -> Conversation:
    return Conversation([{"role": "user", "content": instruction}], None, context)


def test_the_leaked_indentation_is_llm_adapters_own():
    assert prompt_text("alpaca_leaked_indentation", conversation("What is 1 + 1?"), None) == LEAKED
    assert prompt_text("alpaca_leaked_indentation", conversation("Add.", "1 and 1"), None) == LEAKED_WITH_INPUT


def test_llm_adapters_trains_on_other_blank_lines_and_line_ends():
    training = "alpaca_leaked_indentation_training"
    indented = LEAKED.replace("request. \n", "request.  \n").replace("1?\n\n", f"1?\n{' ' * 16}\n")
    assert prompt_text(training, conversation("What is 1 + 1?"), None) == indented
    indented = LEAKED_WITH_INPUT.replace("request.\n", "request. \n")
    for end in ("Add.", "1 and 1"):
        indented = indented.replace(f"{end}\n\n", f"{end}\n{' ' * 16}\n")
    assert prompt_text(training, conversation("Add.", "1 and 1"), None) == indented


def test_alpaca_is_stanfords_text_without_indentation():
    clean = LEAKED.replace(" " * 16, "").replace("request. \n", "request.\n")
    assert prompt_text("alpaca", conversation("What is 1 + 1?"), None) == clean
    assert prompt_text("alpaca", conversation("Add.", "1 and 1"), None) == LEAKED_WITH_INPUT.replace(" " * 16, "")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def rows(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("template", get_args(Template))
def test_trainer_teacher_and_evaluator_give_a_row_the_same_tokens(template, tokenizer, rows, tiny_model):
    from tutelage.evaluator.config import ServeConfig
    from tutelage.evaluator.protocols import paper
    from tutelage.evaluator.tasks import TASKS
    from tutelage.evaluator.tasks.base import Item
    from tutelage.teacher_server.config import GenerateConfig
    from tutelage.teacher_server.jobs import generate
    from tutelage.trainer.data.dataset import read_dataset

    given = [row for row in ROWS if template != "plain" or not row["input"]]
    rows.write_text("".join(json.dumps(row) + "\n" for row in given))
    trained = read_dataset(rows, tokenizer, template=template, max_tokens=1000).examples
    config = GenerateConfig(data=rows, tokenizer=tiny_model, template=template, out=rows.with_suffix(".out"))
    generated = generate.encode_prompts([asked for _, asked in generate.read_conversations(rows)], config)
    engine = SimpleNamespace(tokenizer=tokenizer, max_tokens=4096)
    for row, example, ids in zip(given, trained, generated, strict=True):
        item = Item("0", row["instruction"], row["input"], row["output"])
        asked = paper.prepare(TASKS["gsm8k"], item, engine, ServeConfig(prompt=template))
        assert list(example.prompt_ids) == asked.prompt_ids == list(ids)


def test_the_ready_studies_score_with_the_text_that_they_train_on():
    compared = []
    for path in sorted((ROOT / "deploy" / "studies").glob("*.yaml")):
        study = yaml.safe_load(path.read_text())
        trained = study["settings"].get("data", {}).get("template", "chat")
        protocols = {task.get("protocol", "paper") for task in study["evaluation"]["tasks"]}
        assert protocols in ({"paper"}, {"open"}, {"paper", "loglik"}), path
        scored = "alpaca" if protocols == {"open"} else study["evaluation"]["serve"]["prompt"]
        assert trained == scored, path
        compared.append(path.name)
    assert len(compared) == 9


def test_a_tokenizer_without_a_chat_template_says_which_others_there_are():
    with pytest.raises(DataError, match="such as plain or alpaca"):
        prompt_text("chat", conversation("x"), SimpleNamespace(chat_template=None))
