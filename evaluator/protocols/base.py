"""What a protocol is: how an item becomes a question to a model, and the model's answer a row.

Each module of this room but `prompts` is one; `PROTOCOLS` in the room's `__init__` names them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tutelage.errors import InvalidRequest
from tutelage.evaluator.config import EvaluationSettings
from tutelage.evaluator.models.base import Engine, Sampling
from tutelage.evaluator.tasks.base import Item, Task


class LeftOut(InvalidRequest):
    """An item that a protocol leaves out by its own rule: a kind of its own in the row, and no failure.

    Subclasses have a `finish_reason`, which stands in the row.
    """

    finish_reason = ""


class JoinSpanned(LeftOut):
    """One token spans the end of a context and all of its continuation, so nothing is left to be scored."""

    finish_reason = "join_spanned"


class TooLong(LeftOut):
    """A prompt of more tokens than the protocol asks with."""

    finish_reason = "too_long"


class Question(Protocol):
    """An item as a model is asked it."""

    @property
    def item(self) -> Item:
        """What is asked."""
        ...

    @property
    def seed(self) -> int:
        """Of the answer, for the row."""
        ...

    @property
    def prompt_hash(self) -> str:
        """16 hex digits of what the model reads."""
        ...

    @property
    def tokens(self) -> int:
        """By which items of like length share a batch."""
        ...


class EvaluationProtocol(Protocol):
    """What a module of this room has."""

    @property
    def METRIC(self) -> str:  # noqa: N802
        """Name of the metric in `score`, for the rows."""
        ...

    def seeds_of(self, seed: int) -> tuple[int, ...]:
        """Seeds of an item's answers, for an evaluation's seed; one row an answer."""
        ...

    def template_of(self, settings: EvaluationSettings) -> str:
        """Name of the prompt template, for the rows."""
        ...

    def prepare(self, task: Task, item: Item, engine: Engine, settings: EvaluationSettings, seed: int) -> Question:
        """The item in token ids.

        Raises:
            ConfigurationError: no item can be asked like this.
            InvalidRequest: it cannot be asked.
            LeftOut: the protocol leaves it out.

        """
        ...

    def answer(
        self, task: Task, questions: Sequence[Any], engine: Engine, settings: EvaluationSettings
    ) -> list[dict[str, Any]]:
        """What of the rows this protocol knows, one a question."""
        ...


@dataclass(frozen=True)
class Prompt:
    """A `Question` that is answered by generating."""

    item: Item
    seed: int
    prompt_ids: list[int]
    prompt_hash: str

    @property
    def tokens(self) -> int:
        """By which items of like length share a batch."""
        return len(self.prompt_ids)

    def generation_seed(self, task: Task) -> int:
        """63 bits from the question's seed and the item, whatever batch it is in."""
        key = f"{self.seed} {task.name} {self.item.item_id} {self.item.item_hash}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def require_room(prompt_tokens: int, sampling: Sampling, engine: Engine) -> None:
    """Refuses a prompt after which the whole answer would not fit: what is cut is not what was asked.

    Raises:
        InvalidRequest: prompt and answer do not fit into the model's context.

    """
    room = engine.max_tokens - sampling.max_new_tokens
    if prompt_tokens > room:
        raise InvalidRequest(f"the prompt has {prompt_tokens} tokens; {room} fit beside the answer")


def text_hash(text: str) -> str:
    """The `prompt_hash` of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
