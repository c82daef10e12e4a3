"""Which objectives there are, what each needs and which signals serve it: the one table.

The check of a configuration, the client's request to the teacher and the documentation read it; it needs no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tutelage.errors import ConfigurationError

SignalKind = Literal["hidden", "topk", "candidates"]
Setting = float | bool | str


@dataclass(frozen=True)
class Parameter:
    """One number, switch or word of an objective."""

    default: Setting
    allowed: str
    """For people; numbers as an interval, words separated by `|`."""
    low: float = 0.0
    high: float = 1.0
    open_low: bool = False
    open_high: bool = False

    def allows(self, value: Setting) -> bool:
        """Whether the value is of the right type and in range."""
        if isinstance(self.default, bool):
            return isinstance(value, bool)
        if isinstance(self.default, str):
            return value in self.allowed.split(" | ")
        if isinstance(value, bool | str):
            return False
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)


@dataclass(frozen=True)
class Objective:
    """One row of the table."""

    name: str
    definition: str
    """As printed in the documentation; p teacher, q student."""
    data: str
    """Whose sequences it is meant for."""
    exact: tuple[SignalKind, ...] = ()
    """Kinds that serve it as defined, `topk` and `candidates` with a tail bucket; none if no teacher is needed."""
    approximate: tuple[SignalKind, ...] = ()
    """Kinds that serve it only if the configuration says `approximate: true`."""
    refused: Mapping[SignalKind, str] = field(default_factory=dict)
    """Kinds that would change the objective, and why."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    zero_teacher: bool = False
    """Whether it is finite where the teacher has probability 0, so that a truncated teacher can serve it."""
    sampled_token: bool = False
    """Whether it needs the sampled token rather than whole distributions."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's signals are needed."""
        return bool(self.exact)

    @property
    def sequences(self) -> Literal["all", "data", "own"]:
        """Whose sequences it is defined on: estimates from sampled tokens the student's own, targets the data's."""
        if self.sampled_token:
            return "own"
        return "all" if self.needs_teacher else "data"

    @property
    def default_kind(self) -> SignalKind | None:
        """The kind that is asked for if the configuration names none."""
        return self.exact[0] if self.exact else None


_BETA = Parameter(0.5, "[0, 1]")
_ALPHA = Parameter(0.1, "[0, 1)", open_high=True)
_NORMALIZE = Parameter(False, "true | false")
_REVERSE_ON_TOPK = (
    "reverse KL on the teacher's top-k sees the student's mistakes only as one lump of tail mass; "
    "without the tail it is a different objective, whose optimum is 1/e of the teacher's mass"
)

_ROWS = (
    Objective("sft", "−ln q(y), y from the data set", "data set"),
    Objective("seq_kd", "−ln q(y), y written by the teacher (Kim & Rush 2016)", "teacher"),
    Objective(
        "forward_kl",
        "KL(p‖q) (Hinton 2015)",
        "either",
        ("hidden", "topk"),
        ("candidates",),
        zero_teacher=True,
    ),
    Objective(
        "reverse_kl",
        "KL(q‖p) (Gu 2024)",
        "either",
        ("hidden", "candidates"),
        refused={"topk": _REVERSE_ON_TOPK},
    ),
    Objective(
        "gkd",
        "β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q; KL(p‖q) at β = 0, KL(q‖p) at β = 1 (Agarwal 2024)",
        "student and data set",
        ("hidden", "topk", "candidates"),
        parameters={"beta": _BETA, "normalize_beta": _NORMALIZE},
        zero_teacher=True,
    ),
    Objective(
        "jsd",
        "½·KL(p‖m) + ½·KL(q‖m), m = ½p + ½q (Lin 1991)",
        "either",
        ("hidden", "topk", "candidates"),
        zero_teacher=True,
    ),
    Objective(
        "skew_kl",
        "KL(p ‖ αp + (1−α)q) (Ko 2024)",
        "either",
        ("hidden", "topk"),
        ("candidates",),
        parameters={"alpha": _ALPHA},
        zero_teacher=True,
    ),
    Objective(
        "skew_reverse_kl",
        "KL(q ‖ αq + (1−α)p) (Ko 2024)",
        "either",
        ("hidden", "candidates"),
        refused={"topk": _REVERSE_ON_TOPK},
        parameters={"alpha": _ALPHA},
    ),
    Objective(
        "tvd",
        "½·Σ|p − q| (Wen 2023)",
        "either",
        ("hidden", "topk", "candidates"),
        zero_teacher=True,
    ),
    Objective(
        "adaptive_kl",
        "w·KL(p‖q) + (1−w)·KL(q‖p), w the share of Σ|p − q| in the teacher's head (Wu 2025)",
        "either",
        ("hidden",),
        refused={"topk": _REVERSE_ON_TOPK, "candidates": "the teacher's head may lie outside the student's candidates"},
        parameters={"head_mass": Parameter(0.5, "(0, 1)", open_low=True, open_high=True)},
    ),
    Objective(
        "policy_gradient_kl",
        "the gradient of KL(q‖p) (or, k3, of KL(p‖q)) from the sampled token (Lu 2025)",
        "student",
        ("topk", "candidates", "hidden"),
        parameters={
            "estimator": Parameter(
                "policy_gradient", "policy_gradient | k2_reverse_kl | k3_forward_kl | constant_advantage"
            )
        },
        sampled_token=True,
    ),
    Objective(
        "paper_code/forward_kl",
        "Σ (p+10⁻⁹)(ln(p+10⁻⁹) − ln q): what the released code calls Seq-KD",
        "data set",
        ("hidden",),
        zero_teacher=True,
    ),
    Objective(
        "paper_code/reverse_kl",
        "Σ (q+10⁻⁹)(ln q − ln p): the released Rev-KD",
        "data set",
        ("hidden",),
    ),
    Objective(
        "paper_code/gkd",
        "β·KL(p‖m) + (1−β)·KL(q‖m), m = βq + (1−β)p: the released GKD",
        "student and data set",
        ("hidden",),
        parameters={"beta": Parameter(0.5, "(0, 1)", open_low=True, open_high=True)},
    ),
)

OBJECTIVES: Mapping[str, Objective] = {row.name: row for row in _ROWS}


def objective_named(name: str) -> Objective:
    """The row of that name.

    Raises:
        ConfigurationError: there is none; names the nearest.

    """
    if name not in OBJECTIVES:
        nearest = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigurationError(f"{name!r} is none of {', '.join(OBJECTIVES)}{hint}", "objective")
    return OBJECTIVES[name]


def resolve_parameters(name: str, given: Mapping[str, Setting]) -> dict[str, Setting]:
    """All parameters of an objective, from the given ones and the defaults.

    Raises:
        ConfigurationError: an unknown parameter, or a value out of range.

    """
    known = objective_named(name).parameters
    for key, value in given.items():
        if key not in known:
            allowed = ", ".join(known) or "no parameters"
            raise ConfigurationError(f"{name} has no parameter {key!r}; it has {allowed}", f"parameters.{key}")
        if key == "estimator" and value == "k1":
            raise ConfigurationError("k1 as a loss has an expected gradient of 0; use policy_gradient", "estimator")
        if not known[key].allows(value):
            raise ConfigurationError(f"{value!r} is not in {known[key].allowed}", f"parameters.{key}")
    return {key: given.get(key, parameter.default) for key, parameter in known.items()}


def check_signal(
    name: str,
    kind: SignalKind,
    *,
    parameters: Mapping[str, Setting],
    noise: float = 0.0,
    truncates: bool = False,
    approximate: bool = False,
) -> None:
    """Refuses a signal kind that does not serve the objective as it is configured.

    Args:
        name: of the objective.
        kind: of the signal.
        parameters: of the objective, resolved or not.
        noise: standard deviation of the noise on the teacher's logits.
        truncates: whether the teacher is cut to its top k or top p.
        approximate: whether the configuration accepts an approximation.

    Raises:
        ConfigurationError: says why, and which kind to use.

    """
    row = _effective(objective_named(name), resolve_parameters(name, parameters))
    remedy = f"use {' or '.join(row.exact)}" if row.exact else "it needs no teacher"
    if kind in row.refused:
        raise ConfigurationError(f"{name} is refused on {kind}: {row.refused[kind]}; {remedy}", "signal.kind")
    if kind not in row.exact + row.approximate:
        raise ConfigurationError(f"{name} is not served by {kind}; {remedy}", "signal.kind")
    if kind not in row.exact and not approximate:
        raise ConfigurationError(f"{kind} serves {name} only approximately; {remedy}, or say approximate: true")
    if kind != "hidden" and noise > 0.0 and not approximate:
        raise ConfigurationError(
            f"noise {noise} is exact only with hidden, since {kind} does not carry the tail's logits; "
            "use hidden, or say approximate: true",
            "noise",
        )
    if truncates and kind != "hidden":
        raise ConfigurationError(f"a truncated teacher needs hidden, not {kind}", "signal.kind")
    if truncates and not row.zero_teacher:
        raise ConfigurationError(f"{row.name} is infinite where a truncated teacher has probability 0", "top_p")


def _effective(row: Objective, parameters: Mapping[str, Setting]) -> Objective:
    """What an objective is at the ends of its parameter, where it becomes another."""
    if row.name == "gkd" and parameters["beta"] in (0.0, 1.0):
        return OBJECTIVES["forward_kl" if parameters["beta"] == 0.0 else "reverse_kl"]
    if row.name == "skew_kl" and parameters["alpha"] == 0.0:
        return OBJECTIVES["forward_kl"]
    return row


def as_markdown() -> str:
    """The table for the documentation."""
    lines = [
        "| objective | definition, p teacher, q student | sequences from | exact with | approximate | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for row in _ROWS:
        parameters = ", ".join(f"`{key}` = {p.default} in {p.allowed}" for key, p in row.parameters.items())
        cells = (f"`{row.name}`", row.definition, row.data, ", ".join(row.exact) or "no teacher")
        lines.append(f"| {' | '.join(cells)} | {', '.join(row.approximate) or '–'} | {parameters or '–'} |")
    return "\n".join(lines) + "\n"
