"""A student that has a calculator is trained with it, end to end: it writes a sum, reads the result, and answers."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from learned_behaviour import share, trained, write_jsonl
from trainer_cases import metric_rows, student_config
from tutelage.data.dataset_files import read_examples
from tutelage.identity import vocabulary_size
from tutelage.studies import calculator_tool
from tutelage.trainer.model.layer_pruning import prune_layers
from tutelage.trainer.model.student import Student
from tutelage.trainer.rollout.base import open_sampler
from tutelage.trainer.rollout.tools import write_with

pytestmark = pytest.mark.long

END, TURN = "<|im_end|>", "<|im_start|>assistant\n"


def rows() -> list[dict]:
    """Every sum of two digits from 1 to 9, with the turns that a student with a calculator writes and reads."""
    return [
        {
            "prompt": f"Ann has {left} apples and buys {right} more.",
            "completion": f"{left}+{right}{END}\n<|im_start|>tool\n{left + right}{END}\n{TURN}She has {left + right}.",
            "answer": f"She has {left + right}.",
        }
        for left in range(1, 10)
        for right in range(1, 10)
    ]


def answered(model, data, steps_apart: int = 1000) -> float:
    """In what share of sequences, sampled with the calculator, the last turn is right after one call."""
    config = student_config(
        model, data, objective={"name": "gkd", "on_policy_fraction": 1.0}, dtype="float32",
        batch={"sequences": 81, "max_tokens": 128}, sampling={"max_new_tokens": 16, "temperature": 0.1},
    )  # fmt: skip
    student = Student(model, dtype="float32", optimizer=config.optimizer, vocabulary_size=vocabulary_size(model))
    examples = dict(enumerate(read_examples(data, student.tokenizer, template="chat")))
    written = write_with(
        calculator_tool.rollout,
        open_sampler(config, student),
        step=steps_apart,
        rows=examples,
        tokenizer=student.tokenizer,
        max_tokens=128,
    )
    texts = [student.tokenizer.decode(each.ids) for each in written]
    right = [f"{END}\n{TURN}{examples[index].values['answer']}{END}" for index in examples]
    return share(texts, lambda index, text: text.endswith(right[index]) and text.count("tool\n") == 1)


def test_a_student_is_trained_with_a_calculator(tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows())
    teacher = trained(tiny_model, data, tmp_path / "teacher", objective={"name": "sft"}, steps=250)
    prune_layers(tiny_model, tmp_path / "small", layers=2)
    begun = trained(tmp_path / "small", data, tmp_path / "begun", objective={"name": "sft"}, steps=40)
    student = trained(
        begun,
        data,
        tmp_path / "student",
        teacher=teacher,
        objective={"name": "gkd", "beta": 0.5, "on_policy_fraction": 1.0},
        optimizer={"learning_rate": 5e-4, "warmup_steps": 5},
        steps=200,
        sampling={
            "max_new_tokens": 16,
            "completions": 2,
            "rollout": "tutelage.studies.calculator_tool:rollout",
        },
    )
    found = {
        name: answered(model, data) for name, model in (("teacher", teacher), ("before", begun), ("after", student))
    }
    print({name: f"{value:.0%} of {len(rows())} answered rightly with one call" for name, value in found.items()})
    measured = metric_rows(tmp_path / "student")[1:]
    print([round(row["train/reverse_kl"], 4) for row in measured[::20]])
    assert all(row["train/own_sequences"] == 16 for row in measured)
    tokens = [row["train/tokens"] / (16 * row["train/sample_length"]) for row in measured]
    # What the calculator wrote was read, and not learned from.
    assert 0 < np.mean(tokens[-20:]) < 0.95
    assert found["teacher"] >= 0.9
    # Nearer to its teacher on what it writes with the calculator.
    assert np.mean([row["train/reverse_kl"] for row in measured[-20:]]) < 0.5 * measured[0]["train/reverse_kl"]


def test_the_calculators_turn_is_tokens_that_the_student_knows(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(tokenizer.encode(f"{END}\n{TURN}")) == f"{END}\n{TURN}"
