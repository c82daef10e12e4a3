"""The part of a student's configuration that says what it minimises, checked against the table of objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from tutelage.config import Config
from tutelage.errors import ConfigurationError
from tutelage.trainer.losses.registry import (
    OBJECTIVES,
    Setting,
    SignalKind,
    check_signal,
    objective_named,
    resolve_parameters,
)

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PARAMETERS = ("beta", "normalize_beta", "alpha", "head_mass", "estimator")
"""Fields of `ObjectiveConfig` that are parameters of single objectives in the table."""
_FRACTION_OF_DATA = {"student and data set": 0.5, "student": 1.0}


class ObjectiveConfig(Config):
    """What a student minimises, and what of the teacher it sees for that."""

    name: str = "gkd"
    """A name of the table of objectives (trainer/losses/registry.py)."""
    beta: float | None = None
    """`gkd`: 0 is forward KL, 1 is reverse KL; left out, 0.5."""
    normalize_beta: bool | None = None
    """`gkd`: divide by beta · (1 - beta), which removes the jump in scale at both ends."""
    alpha: float | None = None
    """`skew_kl` and `skew_reverse_kl`: share of the other distribution in the mixture; left out, 0.1."""
    head_mass: float | None = None
    """`adaptive_kl`: mass of the teacher's head; left out, 0.5."""
    estimator: str | None = None
    """`policy_gradient_kl`: policy_gradient, k2_reverse_kl or k3_forward_kl."""
    on_policy_fraction: Fraction = 0.5
    """λ: probability, drawn for each sequence, that the student writes it itself. Left out, it is 0.5 for
    objectives on both kinds of data, 1 for those on the student's own and 0 for the others."""
    signal: SignalKind | None = None
    """What the teacher sends; left out, the first kind that serves the objective exactly."""
    k: Positive = 64
    """`topk` and `candidates`: ids per position; with `min_mass`, at most."""
    min_mass: Fraction = 0.0
    """`topk`: if above 0, keep at each position the fewest ids that have this mass at `temperature`."""
    temperature: Temperature = 1.0
    """Divides both models' logits."""
    student_temperature: Temperature | None = None
    """Divides the student's logits instead of `temperature`."""
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Standard deviation of the normal noise on the teacher's logits, before the temperature."""
    teacher_top_k: NotNegative = 0
    """Keep only the teacher's k likeliest ids; 0 keeps all."""
    teacher_top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep only the teacher's likeliest ids that have this mass together."""
    scale_by_temperature_squared: bool = False
    """Multiply the loss by temperature² (Hinton et al. 2015)."""
    approximate: bool = False
    """Accept a signal that serves the objective only approximately; written into all metadata."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_table(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        entry = OBJECTIVES.get(filled.get("name", "gkd"))
        if entry is not None:
            defaults = {"on_policy_fraction": _FRACTION_OF_DATA.get(entry.data, 0.0), "signal": entry.default_kind}
            filled |= {key: value for key, value in defaults.items() if filled.get(key) is None}
        return filled

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        entry = objective_named(self.name)
        resolve_parameters(self.name, self.parameters)
        if self.signal is not None:
            check_signal(
                self.name,
                self.signal,
                parameters=self.parameters,
                noise=self.noise,
                truncates=self.teacher_top_k > 0 or self.teacher_top_p < 1,
                approximate=self.approximate,
            )
        fraction = self.on_policy_fraction
        if fraction > 0 and not entry.needs_teacher:
            raise ConfigurationError(
                f"{entry.name} learns from the targets of its data, so it must be 0 (given {fraction})",
                "objective.on_policy_fraction",
            )
        if fraction < 1 and entry.sampled_token:
            raise ConfigurationError(
                f"{entry.name} is defined on the student's own tokens, so it must be 1 (given {fraction})",
                "objective.on_policy_fraction",
            )
        if self.min_mass > 0 and self.signal != "topk":
            raise ConfigurationError(f"only topk keeps ids by mass, not {self.signal}", "objective.min_mass")
        return self

    @property
    def temperature_of_student(self) -> float:
        """What divides the student's logits."""
        return self.temperature if self.student_temperature is None else self.student_temperature

    @property
    def parameters(self) -> dict[str, Setting]:
        """The objective's parameters that were given."""
        given = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in given.items() if value is not None}
