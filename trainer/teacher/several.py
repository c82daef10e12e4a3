"""Several teachers of one student: each row says whom it is asked of, and a batch asks all of them at once.

    teachers:
      math: {address: gpu1:50051}
      code: {address: gpu2:50051, adapter: code}

Each is a teacher of its own, with its weights, its head and its servers. What they share is the student's tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from tutelage.errors import ConfigurationError, DataError
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.teacher.base import SignalArrays, SignalSpec, Teacher, TeacherIdentity, UnembeddingArrays
from tutelage.trainer.teacher.rows import Unembedding
from tutelage.trainer.teacher.to_tensors import unembedding_of

Name = str | None
"""Of a teacher; None is the run's `teacher`, which rows are asked of that name none."""


class SeveralTeachers:
    """A `Teacher` that asks the one that each sequence names.

    Args:
        members: by name.

    """

    def __init__(self, members: Mapping[Name, Teacher]) -> None:
        self.members = members
        first = next(iter(members.values())).identity
        identities = {name or "teacher": member.identity for name, member in members.items()}
        self.identity = TeacherIdentity(
            model_name=" ".join(f"{name}={each.model_name}" for name, each in identities.items()),
            weights_digest=" ".join(f"{name}={each.weights_digest}" for name, each in sorted(identities.items())),
            vocabulary_size=first.vocabulary_size,
            hidden_size=max(each.hidden_size for each in identities.values()),
            noise_floor_kl=max(each.noise_floor_kl for each in identities.values()),
            end_token_ids=tuple(sorted({end for each in identities.values() for end in each.end_token_ids})),
        )

    @property
    def waited_seconds(self) -> float:
        """As `Teacher.waited_seconds`; they are waited for at once."""
        return max(member.waited_seconds for member in self.members.values())

    def score(self, sequences: Sequence[TokenSequence], spec: SignalSpec) -> list[SignalArrays]:
        """As `Teacher.score`, of all of them at once."""
        indices: dict[Name, list[int]] = {}
        for index, sequence in enumerate(sequences):
            indices.setdefault(sequence.teacher, []).append(index)
        answers: list[SignalArrays] = [{}] * len(sequences)
        with ThreadPoolExecutor(max(1, len(indices))) as threads:
            futures = {
                name: threads.submit(self.members[name].score, [sequences[index] for index in own], spec)
                for name, own in indices.items()
            }
            for name, future in futures.items():
                for index, answer in zip(indices[name], future.result(), strict=True):
                    answers[index] = answer
        return answers

    def unembedding(self) -> UnembeddingArrays:
        """Each has its own.

        Raises:
            ConfigurationError: always; `unembeddings` gives them.

        """
        raise ConfigurationError("each of several teachers has a head of its own", "teachers")


def members_of(teacher: Teacher | None) -> Mapping[Name, Teacher]:
    """The teachers that a `Teacher` stands for, by name."""
    if teacher is None:
        return {}
    return teacher.members if isinstance(teacher, SeveralTeachers) else {None: teacher}


def unembeddings(
    teacher: Teacher | None, device: torch.device, vocabulary_size: int | None = None
) -> dict[Name, Unembedding]:
    """The head of each teacher, by its name; as `unembedding_of`."""
    members = members_of(teacher)
    return {name: unembedding_of(each.unembedding(), device, vocabulary_size) for name, each in members.items()}


def require_named(rows: Iterable[Name], teacher: Teacher, data: object) -> None:
    """Refuses rows that no teacher is there for.

    Args:
        rows: whom each row names.
        teacher: the run's.
        data: where the rows are, for the message.

    Raises:
        DataError: names the first such row.

    """
    known = members_of(teacher)
    named = sorted(name for name in known if name is not None)
    for name in rows:
        if name in known:
            continue
        if name is None:
            raise DataError(
                f"a row of {data} names no teacher, and there are {', '.join(named)}; give it a field `teacher` "
                "with one of these, name one for its source, or add `teacher` for rows without a name",
                "teacher",
            )
        raise DataError(
            f"a row of {data} names the teacher {name!r}, which is not there; "
            + (f"choose from {', '.join(named)}" if named else "name it under `teachers`, with its address"),
            "teacher",
        )
