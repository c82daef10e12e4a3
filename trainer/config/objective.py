"""The part of a student's configuration that says what it minimises, checked against the table of objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tutelage.config import Config
from tutelage.errors import ConfigurationError
from tutelage.trainer.losses.registry import (
    OBJECTIVES,
    Objective,
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
_FRACTION_OF_SEQUENCES = {"own": 1.0, "data": 0.0}


class ObjectiveParameters(Config):
    """The parameters of single objectives in the table."""

    beta: float | None = None
    """`gkd`: 0 is forward KL, 1 is reverse KL; left out, 0.5."""
    normalize_beta: bool | None = None
    """`gkd`: divide by beta · (1 - beta), which removes the jump in scale at both ends."""
    alpha: float | None = None
    """`skew_kl` and `skew_reverse_kl`: share of the other distribution in the mixture; left out, 0.1."""
    head_mass: float | None = None
    """`adaptive_kl`: mass of the teacher's head; left out, 0.5."""
    estimator: str | None = None
    """`policy_gradient_kl`: policy_gradient, k2_reverse_kl or k3_forward_kl; or, as a control, constant_advantage."""

    @property
    def parameters(self) -> dict[str, Setting]:
        """Those that were given."""
        given = {name: getattr(self, name) for name in PARAMETERS}
        return {name: value for name, value in given.items() if value is not None}


class TermConfig(ObjectiveParameters):
    """One of several objectives that are added up."""

    name: str
    """A name of the table of objectives."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """What its mean over its tokens is multiplied with."""
    sequences: Literal["all", "data", "own"] | None = None
    """Whose sequences it is computed on: all of a batch, the data's, or the student's own; left out, all that it is
    defined on."""

    @model_validator(mode="before")
    @classmethod
    def _fill_sequences(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("sequences") is not None:
            return values
        entry = OBJECTIVES.get(values.get("name", ""))
        return {**values, "sequences": entry.sequences} if entry else values

    @model_validator(mode="after")
    def _check(self) -> TermConfig:
        resolve_parameters(self.name, self.parameters)
        if self.entry.sequences not in ("all", self.sequences):
            raise ConfigurationError(
                f"{self.sequences}, but {self.name} is defined on sequences of {self.entry.sequences} only", "sequences"
            )
        return self

    @property
    def entry(self) -> Objective:
        """Its row of the table."""
        return objective_named(self.name)

    @property
    def label(self) -> str:
        """What it is called among the metrics."""
        return self.name if self.sequences == self.entry.sequences else f"{self.name}@{self.sequences}"

    def includes(self, *, own: bool) -> bool:
        """Whether it is computed on a sequence that the student wrote itself (`own`), or on one of the data."""
        return self.sequences in ("all", "own" if own else "data")


class ObjectiveConfig(ObjectiveParameters):
    """What a student minimises, and what of the teacher it sees for that."""

    name: str = "gkd"
    """A name of the table of objectives (trainer/losses/registry.py); of `terms`, their names with a + between."""
    cross_entropy_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """α: the loss is (1 - α) times the objective and α times the cross-entropy on the data's completions."""
    terms: tuple[TermConfig, ...] = ()
    """Objectives that are added up, each with its weight, instead of `name` and its parameters."""
    on_policy_fraction: Fraction = 0.5
    """λ: probability, drawn for each prompt, that the student writes the sequence itself. Left out, it is 0.5 for
    objectives on both kinds of data, 1 for those on the student's own and 0 for the others."""
    signal: SignalKind | None = None
    """What the teacher sends; left out, the first kind that serves the objective (all terms) exactly."""
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
    """Multiply what compares with the teacher by temperature² (Hinton et al. 2015)."""
    importance_weights: bool = False
    """`policy_gradient_kl`: multiply each token's value by q / μ, the student's probability of it over that with which
    the sampler drew it; then another sampling temperature and older weights are exact, too."""
    importance_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest importance weight; what is above is cut, which is a bias, so it takes `approximate: true`."""
    shuffle_teacher: bool = False
    """A control: each sequence learns from what the teacher says about one of another prompt of its batch."""
    equal_teacher: bool = False
    """A control: the teacher that is learned from is the student as it starts, in its own process. The run's teacher
    is asked about held-out sequences alone."""
    approximate: bool = False
    """Accept a signal or a clip that serves the objective only approximately; written into all metadata."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_table(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        filled = dict(values)
        terms = [term for term in filled.get("terms") or () if isinstance(term, Mapping)]
        if terms:
            filled.setdefault("name", "+".join(str(term.get("name")) for term in terms))
        else:
            terms = [{"name": filled.get("name", "gkd")}]
            terms += [{"name": "sft"}] if filled.get("cross_entropy_weight") else []
        known = [(OBJECTIVES[term["name"]], term.get("sequences")) for term in terms if term.get("name") in OBJECTIVES]
        learning = [entry for entry, _ in known if entry.needs_teacher]
        kinds = [kind for entry in learning[:1] for kind in entry.exact if all(kind in each.exact for each in learning)]
        shares = {_FRACTION_OF_SEQUENCES.get(str(own), _FRACTION_OF_DATA.get(entry.data, 0.0)) for entry, own in known}
        defaults = {
            "on_policy_fraction": shares.pop() if len(shares) == 1 else 0.5,
            "signal": kinds[0] if kinds else None,
        }
        return filled | {key: value for key, value in defaults.items() if filled.get(key) is None}

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.terms:
            self._check_terms()
        else:
            resolve_parameters(self.name, self.parameters)
        labels = [term.label for term in self.weighted_terms]
        if len(set(labels)) < len(labels):
            raise ConfigurationError(f"one of {', '.join(labels)} is there twice", "objective.terms")
        for term in self.weighted_terms:
            if self.signal is not None and term.entry.needs_teacher:
                check_signal(
                    term.name,
                    self.signal,
                    parameters=term.parameters,
                    noise=self.noise,
                    truncates=self.teacher_top_k > 0 or self.teacher_top_p < 1,
                    approximate=self.approximate,
                )
        self._check_fraction()
        for name in ("shuffle_teacher", "equal_teacher"):
            if getattr(self, name) and not self.needs_teacher:
                raise ConfigurationError(
                    f"a control of what a teacher brings, and {self.label} asks none; leave it out", f"objective.{name}"
                )
        if self.equal_teacher and self.signal != "hidden":
            raise ConfigurationError(
                f"the student's start answers with its hidden states, not with {self.signal}; use signal: hidden",
                "objective.equal_teacher",
            )
        if self.shuffle_teacher and self.signal == "candidates":
            raise ConfigurationError(
                "candidates are logits at ids of the one sequence that they were asked for; use signal: hidden",
                "objective.shuffle_teacher",
            )
        if self.min_mass > 0 and self.signal != "topk":
            raise ConfigurationError(f"only topk keeps ids by mass, not {self.signal}", "objective.min_mass")
        if self.importance_weights and not self.samples_tokens:
            raise ConfigurationError(
                f"weighs an estimate from sampled tokens, which {self.label} is not; leave it out",
                "objective.importance_weights",
            )
        if self.importance_clip is not None and not (self.importance_weights and self.approximate):
            raise ConfigurationError(
                "cuts importance weights, after which the estimate has a bias; leave it out, or say "
                "importance_weights: true and approximate: true",
                "objective.importance_clip",
            )
        return self

    def _check_terms(self) -> None:
        given = [*(["cross_entropy_weight"] if self.cross_entropy_weight else []), *self.parameters]
        if self.name != "+".join(term.name for term in self.terms):
            given.insert(0, "name")
        if given:
            raise ConfigurationError(
                f"say all that is minimised; leave {', '.join(given)} out, or give it to a term", "objective.terms"
            )

    def _check_fraction(self) -> None:
        """Each term must find sequences of its own in a batch, and each sequence a term."""
        fraction, terms = self.on_policy_fraction, self.weighted_terms
        for own, there, limit in ((True, fraction > 0, "0"), (False, fraction < 1, "1")):
            whose = "its student's own" if own else "the data's"
            seeing = [term for term in terms if term.includes(own=own)]
            if there and not seeing:
                raise ConfigurationError(
                    f"{self.label} is not defined on {whose} sequences, so it must be {limit} (given {fraction})",
                    "objective.on_policy_fraction",
                )
            blind = [term.name for term in terms if not term.includes(own=not own)]
            if not there and blind:
                raise ConfigurationError(
                    f"{', '.join(blind)} would have no sequence to learn from, only {whose} have it; it must be "
                    f"{'above 0' if own else 'below 1'} (given {fraction})",
                    "objective.on_policy_fraction",
                )

    @property
    def weighted_terms(self) -> tuple[TermConfig, ...]:
        """What is minimised: the sum of each term's weight times its mean over its tokens."""
        if self.terms:
            return self.terms
        share = self.cross_entropy_weight
        main = TermConfig.model_validate({"name": self.name, "weight": 1.0 - share, **self.parameters})
        return (main, TermConfig(name="sft", weight=share)) if share else (main,)

    @property
    def label(self) -> str:
        """What it is called among other students' objectives: its terms with their weights if there are several."""
        terms = self.weighted_terms
        return terms[0].label if len(terms) == 1 else " + ".join(f"{term.weight:g} {term.label}" for term in terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's signals are needed."""
        return any(term.entry.needs_teacher for term in self.weighted_terms)

    @property
    def samples_tokens(self) -> bool:
        """Whether a term is an estimate from the sampled tokens."""
        return any(term.entry.sampled_token for term in self.weighted_terms)

    @property
    def temperature_of_student(self) -> float:
        """What divides the student's logits."""
        return self.temperature if self.student_temperature is None else self.student_temperature
