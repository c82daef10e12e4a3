"""What a checkpoint remembers besides tensors: how far the training was, and of what it is the training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tutelage.errors import CheckpointError, IdentityMismatch
from tutelage.manifest import is_committed
from tutelage.trainer.checkpoint.best import Best
from tutelage.trainer.config.student import StudentConfig
from tutelage.trainer.data.sequences import Completion

STATE_FILE = "state.json"
_ADVICE = "go on with what it began with, or begin a new run in another output folder"
# The addresses of teacher and evaluator are the cohort's settings, and no student's: those may change in any case.
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
    "sampling.stream",
    "sampling.writers.count",
    "sampling.writers.threads",
    "sampling.writers.gpus",
}


@dataclass(frozen=True)
class Rollout:
    """The completions that a student generated for one batch."""

    step: int
    """Which learns from it."""
    weights_version: int
    """Steps done when it was begun."""
    completions: Mapping[int, Completion]
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
    """Weights of the teacher; of several, NAME=digest of each; empty without one."""
    best: Best = field(default_factory=Best)
    """The best measurement so far."""
    rollouts: tuple[Rollout, ...] = ()
    """Of later batches: with `sampling.max_staleness` the weights that wrote them are gone."""
    spent_tokens: int = 0
    """Tokens of its budget that are spent, if it ends by tokens."""

    @property
    def training_digest(self) -> str:
        """SHA-256, hex, of what is trained: settings, data, teacher."""
        return hashlib.sha256(
            f"{self.config_digest} {self.data_fingerprint} {self.teacher_digest}".encode()
        ).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `state.json`."""
        text = json.dumps(asdict(self), indent=1, default=lambda array: array.tolist())
        (folder / STATE_FILE).write_text(text, encoding="utf-8")

    def require_same_training(self, now: State, differences: Sequence[str]) -> None:
        """Refuses to go on with something else than was begun.

        Args:
            now: of the training that wants to go on.
            differences: as `differing_settings`, for the message.

        Raises:
            CheckpointError: configuration or data have changed.
            IdentityMismatch: the teacher has.

        """
        if self.config_digest != now.config_digest:
            raise CheckpointError(_other_settings(differences), "students")
        if self.data_fingerprint != now.data_fingerprint:
            raise CheckpointError(f"this student's training began with other data; {_ADVICE}", "data.path")
        if self.teacher_digest != now.teacher_digest:
            before, after = set(self.teacher_digest.split()), set(now.teacher_digest.split())
            raise IdentityMismatch(
                f"this student's training began with the teacher {_short(before - after)}, but "
                f"{_short(after - before)} answers; {_ADVICE}",
                "teacher",
            )


def _short(digests: Collection[str]) -> str:
    """Enough of digests for the eye; of several teachers, each is NAME=digest."""
    pairs = [digest.rpartition("=") for digest in sorted(digests)]
    return ", ".join(f"{name}{equals}{digest[:12]}…" for name, equals, digest in pairs) or "none"


def read_state(folder: Path) -> State:
    """The state in a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or another version of this program wrote it.

    """
    path = folder / STATE_FILE
    try:
        values = json.loads(path.read_bytes())
        expected = {each.name for each in fields(State)}
        if values.keys() != expected:
            raise CheckpointError(
                f"{path} holds {', '.join(sorted(values))}, expected {', '.join(sorted(expected))}: another "
                "version of tutelage wrote this checkpoint, whose settings may have had other names or meanings; begin "
                "a new run in another output folder, or go on with that version"
            )
        rollouts = tuple(
            Rollout(
                batch["step"],
                batch["weights_version"],
                {int(index): _completion(values) for index, values in batch["completions"].items()},
            )
            for batch in values["rollouts"]
        )
        return State(**{**values, "best": Best(**values["best"]), "rollouts": rollouts})
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the state of a training: {error!r}; remove {folder}, and the training goes on from the "
            "checkpoint before it"
        ) from error


def _completion(values: Mapping[str, Any]) -> Completion:
    logp, mask, versions = values["logp"], values["mask"], values["versions"]
    return Completion(
        np.array(values["ids"], np.int32),
        None if logp is None else np.array(logp, np.float32),
        None if mask is None else np.array(mask, np.bool_),
        None if versions is None else np.array(versions, np.int32),
    )


def config_digest(config: StudentConfig) -> str:
    """SHA-256, hex, of the settings that change numbers."""
    settings = _counting(config.model_dump(mode="json"))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def refuse_other_settings(config: StudentConfig, folder: Path) -> None:
    """Refuses a configuration that a training which has a checkpoint did not begin with; looks at no tensor.

    Args:
        config: the student's, before its epochs have become steps.
        folder: its own.

    Raises:
        CheckpointError: names each setting that differs.

    """
    committed = [path for path in sorted((folder / "checkpoints").glob("step-*")) if is_committed(path)]
    differences = differing_settings(config, folder) if committed else []
    if differences:
        longer = any(each.startswith("steps: ") for each in differences)
        # The learning rate's schedule ends with the steps: a longer one had another rate at every step.
        how = f"; to train on from where it is, begin a new run with init: {committed[-1]}" if longer else ""
        raise CheckpointError(f"{config.id}: {_other_settings(differences)}{how}", "students")


def differing_settings(config: StudentConfig, folder: Path) -> list[str]:
    """The settings that change numbers and are others than `student.yaml` says, each with both values.

    Empty as well where there is no such file, or none that can be read: what decides is the digest in a checkpoint.
    """
    try:
        before = yaml.safe_load((folder / "student.yaml").read_bytes())
    except (OSError, yaml.YAMLError):
        return []
    now = _counting(config.model_dump(mode="json"))
    if not isinstance(before, dict):
        return []
    before = _counting(before)
    if now["epochs"] is not None and before.get("epochs") == now["epochs"]:
        # The steps follow from the data; only one of the two configurations may have worked them out yet.
        now["steps"] = before.get("steps")
    old, new = _flat(before), _flat(now)
    return [
        f"{name}: {old.get(name, 'none')}, now {new.get(name, 'none')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _counting(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings without `_FREE_SETTINGS`."""
    return {
        key: _counting(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if f"{prefix}{key}" not in _FREE_SETTINGS
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, without those that are none."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return {name: value for name, value in flat.items() if value is not None}


def _other_settings(differences: Sequence[str]) -> str:
    which = f" ({'; '.join(differences)})" if differences else ""
    return f"this student's training began with other settings{which}; {_ADVICE}"
