"""Multiple choice: from an instruction of LLM-Adapters' files to the requests that lm-evaluation-harness makes.

The harness's own names are used where it has them: `doc_to_text` is the template of the context, and a choice is
scored as a continuation of it after one space (its `target_delimiter`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tutelage.errors import DataError
from tutelage.evaluator.tasks.base import Choices, Item

QUESTION_AND_ANSWER = "Question: {question}\nAnswer:"


def shared_context(context: str, options: Sequence[str], labels: Sequence[str], gold: int) -> Choices:
    """Choices that continue one context, each after a space."""
    return Choices(
        contexts=(context,) * len(options),
        continuations=tuple(f" {option}" for option in options),
        lengths=tuple(len(option) for option in options),
        labels=tuple(labels),
        gold=gold,
    )


def unchanged(text: str) -> str:
    """The text itself: a task whose documents need no processing."""
    return text


@dataclass(frozen=True)
class LabelledOptions:
    """The form "<lead><question>⏎⏎<Label>1: …<separator><Label>2: …<end>Answer format: <label>1/<label>2".

    A call is a task's `choices`.

    Attributes:
        lead: what stands before the question.
        label: of the options; in lower case and with its number it is the answer (`answer3`).
        doc_to_text: template of the context, with `{question}`.
        separator: between two options.
        end: between the last option and the answer format.
        process_question: what is done to the question first.
        process_option: what is done to each option first.

    """

    lead: str
    label: str
    doc_to_text: str = QUESTION_AND_ANSWER
    separator: str = " "
    end: str = "\n\n"
    process_question: Callable[[str], str] = unchanged
    process_option: Callable[[str], str] = unchanged

    def __call__(self, item: Item) -> Choices:
        """The options after the question.

        Raises:
            DataError: the instruction does not have the form.

        """
        question, options = self.read(item)
        context = self.doc_to_text.format(question=self.process_question(question))
        return shared_context(context, [*map(self.process_option, options)], self.labels(options), self.gold(item))

    def read(self, item: Item) -> tuple[str, list[str]]:
        """Question and options, as the file has them.

        Raises:
            DataError: the instruction does not have the form.

        """
        body, _, answer_format = item.instruction.rpartition(f"{self.end}Answer format: ")
        question, mark, rest = body.removeprefix(self.lead).partition(f"\n\n{self.label}1: ")
        options = []
        # The answer format alone says how many options there are: a few items of ARC have three or five, not four.
        for number in range(2, answer_format.count("/") + 2):
            option, found, rest = rest.partition(f"{self.separator}{self.label}{number}: ")
            options.append(option)
            mark = mark and found
        if not mark or not item.instruction.startswith(self.lead):
            raise DataError(f"item {item.item_id} does not read '{self.lead}… {self.label}1: …'", "tasks")
        return question, [*options, rest]

    def labels(self, options: Sequence[str]) -> tuple[str, ...]:
        """The answers that the options stand for: `answer1`, `answer2` and so on."""
        return tuple(f"{self.label.lower()}{number}" for number in range(1, len(options) + 1))

    def gold(self, item: Item) -> int:
        """Index of a target such as `answer3`."""
        return int(item.target[-1]) - 1


@dataclass(frozen=True)
class FilledBlank(LabelledOptions):
    """A sentence with a blank `_`: the rest of it is scored after each filled-in option.

    That is "partial evaluation" (Trinh and Le 2018): the contexts differ and the continuation is the same.
    """

    def __call__(self, item: Item) -> Choices:
        """The rest of the sentence after each option.

        Raises:
            DataError: the instruction does not have the form.

        """
        sentence, options = self.read(item)
        before, _, after = sentence.partition("_")
        rest = after.strip()
        return Choices(
            contexts=tuple(before + option for option in options),
            continuations=(f" {rest}",) * len(options),
            lengths=(len(rest),) * len(options),
            labels=self.labels(options),
            gold=self.gold(item),
        )


def lettered_options(item: Item) -> Choices:
    """AQuA's form "<question> Answer Choices: (A) … (E) …"; the harness has AQuA only in AGIEval's own prompt."""
    question, _, rest = item.instruction.partition(" Answer Choices: (A) ")
    options = []
    for letter in "BCDE":
        option, _, rest = rest.partition(f" ({letter}) ")
        options.append(option.strip())
    context = QUESTION_AND_ANSWER.format(question=question)
    return shared_context(context, [*options, rest.strip()], list("ABCDE"), "ABCDE".index(item.target))


_TRUE_OR_FALSE = "Please answer the following question with true or false, question: "


def no_or_yes(item: Item) -> Choices:
    """BoolQ's form; no or yes as in the harness, but without the passage that it gives."""
    question = item.instruction.removeprefix(_TRUE_OR_FALSE).partition("\n\nAnswer format: ")[0]
    context = QUESTION_AND_ANSWER.format(question=f"{question.removesuffix('?')}?")
    return shared_context(context, ["no", "yes"], ["false", "true"], ["false", "true"].index(item.target))


def without_wikihow_tags(text: str) -> str:
    """HellaSwag's `preprocess` of the harness."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\]\n]*\]", "", text).replace("  ", " ")


_LAST_SENTENCE = re.compile(r"(?<=[.!?]) (?=[^.!?]*\Z)")


def wikihow_context(context: str) -> str:
    """HellaSwag's context as the harness writes it: `ctx_a`, then `ctx_b.capitalize()`, without tags.

    LLM-Adapters' file has both in one text. `ctx_b`, the unfinished last sentence, is found by the punctuation.
    """
    finished, _, opening = _LAST_SENTENCE.sub("\n", context).rpartition("\n")
    # `capitalize` also lowers the rest of the sentence; so does the harness.
    return without_wikihow_tags(f"{finished} {opening.capitalize()}" if finished else context)
