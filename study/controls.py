"""What a method is told apart from: the same method with one thing taken away, as a method of its own.

The method `gkd` with `controls: [shuffled, same_tokens]` also trains `gkd.shuffled` and `gkd.same_tokens`.

| control | takes away |
|---|---|
| `shuffled` | that the teacher's answers are about this row: each sequence has those of another one of its batch |
| `same_tokens` | the teacher: fine-tuning on the study's data for as many scored tokens, seed by seed |
| `constant_advantage` | what the teacher says of a sampled token (`policy_gradient_kl`): every reward is -1 |
| `equal_teacher` | that the teacher knows more: it is the student as it starts |
"""

from __future__ import annotations

from tutelage.errors import ConfigurationError
from tutelage.study.config import WITHOUT_TEACHER, Control, MethodConfig, StudyConfig

_ESTIMATE = "policy_gradient_kl"
SAME_TOKENS = "same_tokens"


def method_of(study: StudyConfig, name: str) -> MethodConfig:
    """A method by its name, a control's (`METHOD.CONTROL`) included."""
    return all_methods(study)[name]


def all_methods(study: StudyConfig) -> dict[str, MethodConfig]:
    """The methods of a study, each followed by its controls.

    Raises:
        ConfigurationError: a control takes away what its method has not; or its name is another method's.

    """
    methods: dict[str, MethodConfig] = {}
    for name, method in study.methods.items():
        methods[name] = method
        for control in method.controls:
            if f"{name}.{control}" in study.methods:
                raise ConfigurationError(f"{name}.{control} is the name of its control; choose another", "methods")
            methods[f"{name}.{control}"] = _controlled(name, method, control)
    return methods


def _controlled(name: str, method: MethodConfig, control: Control) -> MethodConfig:
    field = f"methods.{name}.controls"
    if not method.asks_teacher:
        raise ConfigurationError(f"{control}, but {name} asks no teacher while it trains; leave it out", field)
    if control == "constant_advantage" and method.objective.get("name") != _ESTIMATE:
        raise ConfigurationError(f"{control} is of {_ESTIMATE}, which {name} is not; use shuffled", field)
    own = method.model_copy(update={"controls": ()})
    match control:
        case "shuffled":
            return own.model_copy(update={"objective": {**method.objective, "shuffle_teacher": True}})
        case "equal_teacher":
            equal = {"equal_teacher": True, "signal": "hidden"}
            return own.model_copy(update={"objective": {**method.objective, **equal}})
        case "constant_advantage":
            return own.model_copy(update={"objective": {**method.objective, "estimator": control}})
        case "same_tokens":
            # What is said of the teacher or of how the student writes would be refused, or mean nothing.
            kept = {
                key: value for key, value in method.settings.items() if key not in ("objective", "sampling", "data")
            }
            plain = {"objective": {"name": WITHOUT_TEACHER}, "data": "data", "settings": kept}
            return own.model_copy(update=plain)
