"""Sequences that a function of the user's writes with the student: order, masks, refusals."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from tutelage.data.dataset_files import TokenizedExample
from tutelage.errors import ConfigurationError
from tutelage.studies import calculator_tool
from tutelage.trainer.data.sequences import Completion
from tutelage.trainer.rollout.base import done
from tutelage.trainer.rollout.tools import rollout_named, write_with


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


class Script:
    """A sampler that writes what a test says for each context, and remembers what it was asked together."""

    def __init__(self, tokenizer, replies):
        self._tokenizer, self._replies, self.calls = tokenizer, replies, []

    def write(self, step, indices, prompts, *, turn=0, on_piece=None):
        self.calls.append((turn, list(indices)))
        texts = [self._replies[self._tokenizer.decode(prompt)] for prompt in prompts]
        ids = [np.asarray(self._tokenizer.encode(text), np.int32) for text in texts]
        return done([Completion(each, -np.arange(1, len(each) + 1, dtype=np.float32)) for each in ids])


def rows_of(tokenizer, *prompts):
    none = np.zeros(0, np.int32)
    return {
        10 * place: TokenizedExample(np.asarray(tokenizer.encode(prompt), np.int32), none)
        for place, prompt in enumerate(prompts)
    }


ANN = "Ann has 17 and buys 25.<|im_end|>\n<|im_start|>assistant\n"
BOB = "Hi.<|im_end|>\n<|im_start|>assistant\n"
TOOL = "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
REPLIES = {ANN: "17+25<|im_end|>", f"{ANN}17+25<|im_end|>{TOOL}": "She has 42.<|im_end|>", BOB: "Hello.<|im_end|>"}


def test_a_calculator_answers_a_sum_and_is_not_learned_from(tokenizer):
    sampler = Script(tokenizer, REPLIES)
    rows = rows_of(tokenizer, ANN, BOB)
    ann, bob = write_with(calculator_tool.rollout, sampler, step=0, rows=rows, tokenizer=tokenizer, max_tokens=200)
    assert tokenizer.decode(ann.ids) == f"17+25<|im_end|>{TOOL}She has 42.<|im_end|>"
    assert tokenizer.decode(ann.ids[~ann.mask]) == TOOL
    assert tokenizer.decode(ann.ids[ann.mask]) == "17+25<|im_end|>She has 42.<|im_end|>"
    first, last = len(tokenizer.encode("17+25<|im_end|>")), len(tokenizer.encode("She has 42.<|im_end|>"))
    assert ann.logp[ann.mask].tolist() == [*range(-1, -first - 1, -1), *range(-1, -last - 1, -1)]
    assert not ann.logp[~ann.mask].any()
    assert (tokenizer.decode(bob.ids), bob.mask) == ("Hello.<|im_end|>", None)
    # Both at once; then Ann's alone, whose second turn draws anew.
    assert sampler.calls == [(0, [0, 10]), (1, [0])]


def test_a_batch_is_the_same_however_the_threads_run(tokenizer):
    def slow(row, generate, tokenizer):
        time.sleep(random.random() * 0.05)
        return calculator_tool.rollout(row, generate, tokenizer)

    for _ in range(5):
        sampler = Script(tokenizer, REPLIES)
        write_with(slow, sampler, step=0, rows=rows_of(tokenizer, ANN, BOB, ANN), tokenizer=tokenizer, max_tokens=200)
        assert sampler.calls == [(0, [0, 10, 20]), (1, [0, 20])]


def raising(row, generate, tokenizer):
    generate(row.prompt_ids)
    raise KeyError("no such tool")


def claiming(row, generate, tokenizer):
    written = generate(row.prompt_ids)
    return [*written, 5], [True] * (len(written) + 1)


REFUSED = {
    "raises": (raising, "raised KeyError: 'no such tool'"),
    "nothing": (lambda row, generate, tokenizer: None, "returned None, expected token ids and a mask"),
    "lengths": (lambda row, generate, tokenizer: ([1, 2], [True]), "one for each token"),
    "another's tokens": (claiming, r"says that the student wrote token \d+ after the prompt \(5\), which it did not"),
    "a tool alone": (lambda row, generate, tokenizer: ([1, 2], [False, False]), "nothing that the student wrote"),
    "no token": (lambda row, generate, tokenizer: ([-1], [False]), "ids from -1 to -1"),
    "changed": (
        lambda row, generate, tokenizer: ([7, *generate(row.prompt_ids)[1:]], [False] + [True] * 3),
        "one for each token|which it did not",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_function_must_not_do_is_refused(name, tokenizer):
    function, problem = REFUSED[name]
    with pytest.raises(ConfigurationError, match=problem) as refused:
        write_with(
            function,
            Script(tokenizer, REPLIES),
            step=0,
            rows=rows_of(tokenizer, ANN, BOB),
            tokenizer=tokenizer,
            max_tokens=200,
        )
    assert refused.value.field == "sampling.rollout"


def test_without_room_the_student_writes_nothing_and_the_end_is_cut(tokenizer):
    rows = rows_of(tokenizer, ANN)
    room = len(rows[0].prompt_ids) + len(tokenizer.encode(f"17+25<|im_end|>{TOOL}")) - 2
    (ann,) = write_with(
        calculator_tool.rollout, Script(tokenizer, REPLIES), step=0, rows=rows, tokenizer=tokenizer, max_tokens=room
    )
    assert len(rows[0].prompt_ids) + len(ann.ids) == room
    assert tokenizer.decode(ann.ids[ann.mask]) == "17+25<|im_end|>"


@pytest.mark.parametrize("path", ["no.such.module:f", "tutelage.studies.calculator_tool:none", "math:pi"])
def test_a_function_that_is_not_there_is_refused_at_start(path):
    with pytest.raises(ConfigurationError, match=r"cannot be imported|cannot be called") as refused:
        rollout_named(path)
    assert refused.value.field == "sampling.rollout"


def test_the_function_is_found_by_its_name():
    assert rollout_named("tutelage.studies.calculator_tool:rollout") is calculator_tool.rollout
