"""How far a student is from its teacher on sequences that it never trains on.

The teacher scores them once, with hidden states, so the divergences are exact at temperature 1 whatever
the student's own objective is; they are kept on disk, so that all measurements of a run, resumed or not,
compare with the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

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
from tutelage.trainer.teacher.to_tensors import learned_rows, positions, sequence_digests, targets_of

_MEASURES = ("forward_kl", "reverse_kl", "jsd", "top1_agreement", "teacher_entropy", "student_entropy")


class Validation:
    """The held-out sequences and what the teacher says about them.

    Args:
        sequences: what to measure on.
        folder: the student's; keeps `held_out.safetensors`.
        teacher: asked once; None measures the cross-entropy only.
        unembedding: the teacher's.
        batch: sequences that go through the student at once.

    """

    def __init__(
        self,
        sequences: Sequence[TokenSequence],
        *,
        folder: Path,
        teacher: Teacher | None,
        unembedding: Unembedding | None,
        batch: int,
    ) -> None:
        self._batches = [list(sequences[start : start + batch]) for start in range(0, len(sequences), batch)]
        self._rows: list[TeacherRows] | None = None
        if teacher is not None and sequences:
            assert unembedding is not None
            hidden_ND = _stored_or_fetched(sequences, folder / "held_out.safetensors", teacher)
            parts = hidden_ND.split([sum(item.rows for item in batch) for batch in self._batches])
            device = unembedding.matrix_VD.device
            self._rows = [
                HiddenRows(
                    part_ND.to(device), sequence_digests(batch).to(device), positions(batch).to(device), unembedding
                )
                for part_ND, batch in zip(parts, self._batches, strict=True)
            ]

    @torch.no_grad()
    def run(self, student: Student) -> dict[str, float]:
        """Means over all scored positions, at temperature 1, by name `heldout/…`; empty without sequences.

        All workers of a sharded student measure at once, though most of them nothing.
        """
        parts: dict[str, list[Tensor]] = {}
        with student.unsharded():
            head = student.head()
            student.model.eval()
            for index, batch in enumerate(self._batches):
                hidden_ND = student.hidden(batch)
                losses_N = token_cross_entropy(hidden_ND, head, targets_of(batch).to(student.device))
                parts.setdefault("cross_entropy", []).append(losses_N)
                if self._rows is not None:
                    values = diagnostics(hidden_ND, head, self._rows[index], distribution=TeacherDistribution())
                    for name in _MEASURES:
                        parts.setdefault(name, []).append(values[name])
            student.model.train()
        return {f"heldout/{name}": float(torch.cat(values).double().mean()) for name, values in parts.items()}


def _stored_or_fetched(sequences: Sequence[TokenSequence], path: Path, teacher: Teacher) -> Tensor:
    """The teacher's hidden states [N, D] of all rows."""
    total = hashlib.sha256(teacher.identity.weights_digest.encode())
    for item in sequences:
        total.update(len(item.ids).to_bytes(4, "little") + item.start.to_bytes(4, "little") + item.ids.tobytes())
        if item.mask is not None:
            total.update(item.mask.tobytes())
    key = total.hexdigest()
    if path.exists():
        try:
            with safe_open(path, framework="pt") as stored:
                if stored.metadata() == {"key": key}:
                    kept_ND: Tensor = stored.get_tensor("hidden_ND")
                    return kept_ND
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; remove it, and the teacher is asked for the held-out sequences anew, "
                "with answers that differ from the former ones by its noise floor"
            ) from error
    answers = teacher.score(sequences, SignalSpec("hidden"))
    # numpy knows no bfloat16: the bits travel as uint16. Copied, since what came over the wire is read-only.
    learned = [learned_rows(item, answer) for item, answer in zip(sequences, answers, strict=True)]
    hidden_ND = torch.cat([torch.from_numpy(rows["hidden_RD"].copy()) for rows in learned])
    hidden_ND = hidden_ND.view(torch.bfloat16)
    write_durably(path, save({"hidden_ND": hidden_ND}, metadata={"key": key}))
    return hidden_ND
