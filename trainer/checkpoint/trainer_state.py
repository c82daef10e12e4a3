"""What a checkpoint remembers besides tensors: how far the training was, and of what it is the training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from tutelage.errors import CheckpointError, IdentityMismatch
from tutelage.trainer.checkpoint.best import Best
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import TokenIds

STATE_FILE = "state.json"
# Other values of these change no number of a training, but that the order of sums depends on the workers: a checkpoint
# goes on with however many there are.
_FREE_SETTINGS = {
    "gpus",
    "save_every_steps",
    "keep_checkpoints",
    "preset",
    "report_to",
    "gradient_checkpointing",
    "workers",
    "sharding",
}


@dataclass(frozen=True)
class Rollout:
    """The completions that a student generated for one batch."""

    step: int
    """Which learns from it."""
    weights_version: int
    """Of the weights that wrote it: steps done."""
    completions: Mapping[int, TokenIds]
    """By index in the step's batch."""


@dataclass(frozen=True)
class State:
    """All of a training's state that is no tensor.

    Generators have none: each is made anew from the seed, the step and its purpose.
    """

    step: int
    """Steps done; the schedule and the place in the data follow from it."""
    metrics_bytes: int
    """Length of `metrics.jsonl` at that step."""
    config_digest: str
    """As `config_digest`."""
    data_fingerprint: str
    """Of the data set."""
    teacher_digest: str
    """Weights of the teacher; empty without one."""
    best: Best = field(default_factory=Best)
    """The best measurement so far."""
    rollouts: tuple[Rollout, ...] = ()
    """Of later batches: with `sampling.max_staleness` the weights that wrote them are gone."""

    @property
    def training_digest(self) -> str:
        """SHA-256, hex, of what is trained: settings, data, teacher."""
        return hashlib.sha256(
            f"{self.config_digest} {self.data_fingerprint} {self.teacher_digest}".encode()
        ).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `state.json`."""
        text = json.dumps(asdict(self), indent=1, default=lambda ids: ids.tolist())
        (folder / STATE_FILE).write_text(text, encoding="utf-8")

    def require_same_training(self, now: State) -> None:
        """Refuses to go on with something else than was begun.

        Raises:
            CheckpointError: configuration or data have changed.
            IdentityMismatch: the teacher has.

        """
        advice = "go on with what it began with, or begin a new run in another output folder"
        if self.config_digest != now.config_digest:
            raise CheckpointError(f"this student's training began with other settings; {advice}", "students")
        if self.data_fingerprint != now.data_fingerprint:
            raise CheckpointError(f"this student's training began with other data; {advice}", "data.path")
        if self.teacher_digest != now.teacher_digest:
            raise IdentityMismatch(
                f"this student's training began with the teacher {self.teacher_digest[:12]}…, but "
                f"{now.teacher_digest[:12] or 'none'}… answers; {advice}",
                "teacher",
            )


def read_state(folder: Path) -> State:
    """The state in a checkpoint.

    Raises:
        CheckpointError: another version of this program wrote it.

    """
    values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    expected = {each.name for each in fields(State)}
    if values.keys() != expected:
        raise CheckpointError(
            f"{folder / STATE_FILE} holds {', '.join(sorted(values))}, expected {', '.join(sorted(expected))}: another "
            "version of tutelage wrote this checkpoint, whose settings may have had other names or meanings; begin a "
            "new run in another output folder, or go on with that version"
        )
    rollouts = tuple(
        Rollout(
            batch["step"],
            batch["weights_version"],
            {int(index): np.array(ids, np.int32) for index, ids in batch["completions"].items()},
        )
        for batch in values["rollouts"]
    )
    return State(**{**values, "best": Best(**values["best"]), "rollouts": rollouts})


def config_digest(config: StudentConfig) -> str:
    """SHA-256, hex, of the settings that change numbers."""
    settings = config.model_dump(mode="json", exclude=_FREE_SETTINGS)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
