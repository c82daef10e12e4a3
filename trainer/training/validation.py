"""How far a student is from its teacher on sequences that it never trains on.

The teacher scores them once, with hidden states, so the divergences are exact at temperature 1 whatever
the student's own objective is; they are kept on disk, so that all measurements of a run, resumed or not,
compare with the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tutelage.errors import CheckpointError
from tutelage.files import write_durably
from tutelage.trainer.data.sequences import TokenSequence
from tutelage.trainer.losses.diagnostics import diagnostics
from tutelage.trainer.losses.losses import token_cross_entropy
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.model.student import Student
from tutelage.trainer.teacher.base import SignalSpec, Teacher
from tutelage.trainer.teacher.rows import HiddenRows, TeacherRows, Unembedding
from tutelage.trainer.teacher.several import Name
from tutelage.trainer.teacher.to_tensors import learned_rows, positions, sequence_digests, targets_of

_MEASURES = ("forward_kl", "reverse_kl", "jsd", "top1_agreement", "teacher_entropy", "student_entropy")


class Validation:
    """The held-out sequences and what the teacher says about them.

    Args:
        sequences: what to measure on.
        folder: the student's; keeps `held_out.safetensors`.
        teacher: asked once; None measures the cross-entropy only.
        heads: the teacher's unembedding, by the teacher's name.
        batch: sequences that go through the student at once.

    """

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        *,
        folder: Path,
        teacher: Teacher | None,
        heads: Mapping[Name, Unembedding],
        batch: int,
    ) -> None:
        by_teacher: dict[Name, list[TokenSequence]] = {}
        for item in sequences:
            by_teacher.setdefault(item.teacher if teacher else None, []).append(item)
        self._batches: list[list[TokenSequence]] = []
        self._rows: list[TeacherRows] | None = None if teacher is None else []
        hidden: dict[Name, Tensor] = {}
        # A worker that measures nothing leaves alone the file of the one that does.
        if teacher is not None and by_teacher:
            hidden = _stored_or_fetched(by_teacher, folder / "held_out.safetensors", teacher)
        for name, items in by_teacher.items():
            batches = [items[start : start + batch] for start in range(0, len(items), batch)]
            self._batches += batches
            if self._rows is not None:
                self._rows += _rows(hidden[name], batches, heads[name])

    @torch.no_grad()
    def run(self, student: Student) -> dict[str, float]:
        """Means over all scored positions, at temperature 1, by name `heldout/…`; empty without sequences.

        With several teachers also over those of each, by name `heldout/TEACHER/…`.

        All workers of a sharded student measure at once, though most of them nothing.
        """
        parts: dict[str, list[Tensor]] = {}

        def measure(name: str, values_N: Tensor, teacher: Name) -> None:
            parts.setdefault(name, []).append(values_N)
            if teacher is not None:
                parts.setdefault(f"{teacher}/{name}", []).append(values_N)

        with student.unsharded():
            head = student.head()
            student.model.eval()
            for index, batch in enumerate(self._batches):
                hidden_ND = student.hidden(batch)
                losses_N = token_cross_entropy(hidden_ND, head, targets_of(batch).to(student.device))
                measure("cross_entropy", losses_N, batch[0].teacher)
                if self._rows is not None:
                    values = diagnostics(hidden_ND, head, self._rows[index], distribution=TeacherDistribution())
                    for name in _MEASURES:
                        measure(name, values[name], batch[0].teacher)
            student.model.train()
        return {f"heldout/{name}": float(torch.cat(values).double().mean()) for name, values in parts.items()}


def _rows(hidden_ND: Tensor, batches: Sequence[Sequence[TokenSequence]], head: Unembedding) -> list[TeacherRows]:
    """What one teacher says about each batch."""
    device, sizes = head.matrix_VD.device, [sum(item.rows for item in batch) for batch in batches]
    return [
        HiddenRows(part_ND.to(device), sequence_digests(batch).to(device), positions(batch).to(device), head)
        for part_ND, batch in zip(hidden_ND.split(sizes), batches, strict=True)
    ]


def _stored_or_fetched(
    by_teacher: Mapping[Name, Sequence[TokenSequence]], path: Path, teacher: Teacher
) -> dict[Name, Tensor]:
    """The hidden states [N, D] of all rows of each teacher."""
    sequences = [item.for_teacher for items in by_teacher.values() for item in items]
    tensors = {name: "hidden_ND" if name is None else f"hidden_ND/{name}" for name in by_teacher}
    key = _key(sequences, teacher)
    if path.exists():
        try:
            with safe_open(path, framework="pt") as stored:
                if stored.metadata() == {"key": key}:
                    return {name: stored.get_tensor(tensor) for name, tensor in tensors.items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; remove it, and the teacher is asked for the held-out sequences anew, "
                "with answers that differ from the former ones by its noise floor"
            ) from error
    answers = iter(teacher.score(sequences, SignalSpec("hidden")))
    hidden = {}
    for name, items in by_teacher.items():
        rows = [learned_rows(item, next(answers))["hidden_RD"] for item in items]
        # numpy knows no bfloat16: the bits travel as uint16. Joining copies, which what came over the wire needs.
        hidden[name] = torch.from_numpy(np.concatenate(rows)).view(torch.bfloat16)
    write_durably(path, save({tensors[name]: hidden_ND for name, hidden_ND in hidden.items()}, metadata={"key": key}))
    return hidden


def _key(sequences: Sequence[TokenSequence], teacher: Teacher) -> str:
    """SHA-256, hex, of what was asked of whom."""
    total = hashlib.sha256(teacher.identity.weights_digest.encode())
    for item in sequences:
        total.update(len(item.ids).to_bytes(4, "little") + item.start.to_bytes(4, "little") + item.ids.tobytes())
        if item.mask is not None:
            total.update(item.mask.tobytes())
        if item.teacher is not None:
            total.update(item.teacher.encode())
    return total.hexdigest()
