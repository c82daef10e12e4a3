"""What the micro studies start from, generated: problems, number facts, a tokenizer, untrained Llamas of five sizes.

    python deploy/studies/micro_inputs.py build/micro

writes `base.jsonl` (what base models learn: sums, differences and products of small numbers, and to read numbers
off a sentence), `train.jsonl` (word problems with a worked answer; `train-300.jsonl` and `train-1000.jsonl` are its
beginnings, `prompts.jsonl` its questions alone; `held-out.jsonl` other rows with answers), `tasks/<task>.yaml` with
`tasks/<task>.jsonl` (test problems: of four kinds with operands that training problems have, too; `new-operands`, of
all kinds with operands that none has; and `rates`, problems that are no one else's, by which learning rates are
chosen), and `models/<size>/`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from tutelage.files import make_directory_once

SIZES = {"t": (96, 4, 32), "l": (80, 3, 16), "m": (64, 2, 16), "s": (48, 2, 16), "xs": (32, 2, 16)}
"""Hidden width, layers and width of a head by name, the teacher first: on a CPU vLLM takes heads of 32 and more."""
TRAIN_PROBLEMS, TEST_PROBLEMS, FACT_ROWS, READING_ROWS = 4000, 100, 40_000, 40_000
FEW_ANSWERS = (300, 1000)
HELD_OUT_ROWS = 32
_TOKENIZER_PROBLEMS = 300  # of each kind
_VOCABULARY, _CONTEXT_TOKENS = 448, 128
_NEW_SHARE = 4  # one set of operands in four is in no training problem
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}\n{% endfor %}"
_NAMES = ("Ann", "Ben", "Dev", "Eva", "Ida", "Jon", "Kim", "Lea", "Max", "Noa", "Sam", "Tom")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "pears", "pens", "plums", "shells", "stamps")
_CONTAINERS = ("bags", "boxes", "jars", "trays")
_SENTENCES = ("{name} saw {seen}.", "There are {seen} in the {container}.", "{name} and the {container}: {seen}.")


@dataclass(frozen=True)
class Kind:
    """A kind of problem: how its operands are drawn, what it asks, how it is worked."""

    draw: Callable[[random.Random], tuple[int, ...]]
    questions: tuple[str, ...]
    steps: Callable[..., list[str]]


def _sum(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}."


def _difference(a: int, b: int) -> str:
    return f"{a} - {b} = {a - b}."


def _product(a: int, b: int) -> str:
    return f"{a} * {b} = {a * b}."


def _draw_sum(rng: random.Random) -> tuple[int, int]:
    return rng.randint(2, 20), rng.randint(2, 20)


def _draw_difference(rng: random.Random) -> tuple[int, int]:
    large = rng.randint(4, 40)
    return large, rng.randint(max(2, large - 20), min(20, large - 1))


def _draw_product(rng: random.Random) -> tuple[int, int]:
    return rng.randint(2, 9), rng.randint(2, 9)


def _draw_gain_and_loss(rng: random.Random) -> tuple[int, int, int]:
    a, b = _draw_sum(rng)
    return a, b, rng.randint(max(2, a + b - 20), min(20, a + b - 1))


KINDS = {
    "addition": Kind(
        _draw_sum,
        (
            "{name} has {a} {things} and buys {b} more. How many are there?",
            "{name} has {a} {things} and {other} has {b}. How many together?",
        ),
        lambda a, b: [_sum(a, b)],
    ),
    "subtraction": Kind(
        _draw_difference,
        (
            "{name} had {a} {things} and gave away {b}. How many are left?",
            "{name} has {a} {things} and {other} has {b}. How many more has {name}?",
        ),
        lambda a, b: [_difference(a, b)],
    ),
    "multiplication": Kind(
        _draw_product,
        (
            "{name} has {a} {containers} of {b} {things} each. How many in all?",
            "{name} buys {b} {things} a day for {a} days. How many in all?",
        ),
        lambda a, b: [_product(a, b)],
    ),
    "two-steps": Kind(
        _draw_gain_and_loss,
        (
            "{name} has {a} {things}, gets {b} and loses {c}. How many are left?",
            "{name} has {a} {things}, {other} has {b}. Both sell {c} in all. How many remain?",
        ),
        lambda a, b, c: [_sum(a, b), _difference(a + b, c)],
    ),
}


def _is_new(operands: tuple[int, ...]) -> bool:
    return zlib.crc32(repr(tuple(sorted(operands))).encode()) % _NEW_SHARE == 0


def problems(kind: str, *, new: bool, count: int, seed: int, besides: Container[str] = ()) -> list[dict[str, str]]:
    """Different problems of one kind: `question`, `answer` (worked, ends in the number) and `number`.

    Args:
        kind: of `KINDS`.
        new: whether operands are those that no training problem has.
        count: how many; a longer list begins with the shorter one.
        seed: of the draw.
        besides: questions to leave out.

    """
    rng, own = random.Random(f"{kind} {new} {seed}"), KINDS[kind]
    found: dict[str, dict[str, str]] = {}
    while len(found) < count:
        operands = own.draw(rng)
        if _is_new(operands) != new:
            continue
        name, other = rng.sample(_NAMES, 2)
        words = {"name": name, "other": other, "things": rng.choice(_THINGS), "containers": rng.choice(_CONTAINERS)}
        question = rng.choice(own.questions).format(**dict(zip("abc", operands, strict=False)), **words)
        steps = own.steps(*operands)
        number = steps[-1].rstrip(".").split()[-1]
        if question not in besides:
            found[question] = {"question": question, "answer": f"{' '.join(steps)} Answer: {number}", "number": number}
    return list(found.values())


def facts(rng: random.Random) -> Iterator[str]:
    """Number facts without end, all operations alike; every operand of every problem occurs in them."""
    while True:
        yield _sum(rng.randint(1, 20), rng.randint(1, 20))
        large = rng.randint(2, 40)
        yield _difference(large, rng.randint(max(1, large - 20), min(large, 20)))
        yield _product(rng.randint(2, 9), rng.randint(2, 9))


def readings(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Sentences and the numbers in them, without end: how a model learns to find operands in a text."""
    while True:
        numbers = [rng.randint(1, 40) for _ in range(rng.randint(2, 3))]
        seen = ", ".join(f"{number} {rng.choice(_THINGS)}" for number in numbers)
        sentence = rng.choice(_SENTENCES).format(name=rng.choice(_NAMES), seen=seen, container=rng.choice(_CONTAINERS))
        yield f"{sentence}\n", " ".join(map(str, numbers))


def write_data(out: Path) -> None:
    """Training rows, test tasks, what base models learn."""
    train = [row for kind in KINDS for row in problems(kind, new=False, count=TRAIN_PROBLEMS // len(KINDS), seed=0)]
    random.Random(0).shuffle(train)
    answered = [{"question": row["question"], "answer": row["answer"]} for row in train]
    _write_lines(out / "train.jsonl", answered)
    for count in FEW_ANSWERS:
        _write_lines(out / f"train-{count}.jsonl", answered[:count])
    _write_lines(out / "prompts.jsonl", [{"question": row["question"]} for row in train])
    asked = {row["question"] for row in train}
    (out / "tasks").mkdir()
    rates: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for kind in KINDS:
        tested = problems(kind, new=False, count=TEST_PROBLEMS, seed=1, besides=asked)
        _write_task(out / "tasks", kind, tested)
        besides = asked | {row["question"] for row in tested}
        rates += problems(kind, new=False, count=TEST_PROBLEMS, seed=2, besides=besides)
        besides |= {row["question"] for row in rates}
        held_out += problems(kind, new=False, count=HELD_OUT_ROWS // len(KINDS), seed=3, besides=besides)
    _write_task(out / "tasks", "rates", rates)
    _write_lines(out / "held-out.jsonl", [{"question": row["question"], "answer": row["answer"]} for row in held_out])
    new = [row for kind in KINDS for row in problems(kind, new=True, count=TEST_PROBLEMS // len(KINDS), seed=1)]
    _write_task(out / "tasks", "new-operands", new)
    stream = facts(random.Random(2))
    rng = random.Random(3)  # a fact stands at the start of an answer or after another one
    rows = [(rng.choice(("", " ")), *next(stream).split("= ")) for _ in range(FACT_ROWS)]
    lines = [{"prompt": f"{space}{left}=", "completion": f" {right}"} for space, left, right in rows]
    texts = readings(random.Random(4))
    lines += [{"prompt": text, "completion": numbers} for text, numbers in (next(texts) for _ in range(READING_ROWS))]
    rng.shuffle(lines)
    _write_lines(out / "base.jsonl", lines)


def _write_task(folder: Path, name: str, rows: list[dict[str, str]]) -> None:
    _write_lines(folder / f"{name}.jsonl", rows)
    task = {"name": name, "data": f"{name}.jsonl", "question": "{question}", "answer": "{number}"}
    settings = {"extraction": "number", "max_new_tokens": 40}
    (folder / f"{name}.yaml").write_text(json.dumps(task | settings) + "\n")


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_models(out: Path) -> None:
    """One tokenizer, in which a digit is a token, and a Llama of each size with random weights."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = [row for kind in KINDS for row in problems(kind, new=False, count=_TOKENIZER_PROBLEMS, seed=0)]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\d| ?[^\s\d]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"{row['question']} {row['answer']}" for row in rows] + list(_SENTENCES), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_SPECIAL[2], bos_token=_SPECIAL[1], pad_token=_SPECIAL[0]
    )
    fast.chat_template = _CHAT_TEMPLATE
    for name, (width, layers, head) in SIZES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // head,
            num_key_value_heads=width // head,
            max_position_embeddings=_CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.05,
        )
        LlamaForCausalLM(config).save_pretrained(out / name)
        fast.save_pretrained(out / name)


def write(out: Path) -> None:
    """Everything, into a folder that is there."""
    write_data(out)
    write_models(out / "models")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    print(make_directory_once(parser.parse_args().folder.resolve(), write))
