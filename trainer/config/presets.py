"""Settings of "On the generalization vs fidelity paradox in knowledge distillation", by name.

Ramesh, Sengupta, Chakraborty, Findings of ACL 2025, arXiv 2505.15442. `paper_code/…` is what the released code does,
`paper_text/…` what the paper prints; they disagree. Keys are dotted paths of settings:

- `objective.…`: the name and parameters of the objective, the teacher distribution, the share of the student's own
  sequences.
- `reduction`: `token_mean` and `sequence_mean` as in `reductions`; `micro_batch_token_mean` is the mean of the
  micro-batches' token means.
- `on_policy_unit`: whether each `sequence` or each `micro_batch` as a whole is drawn to be the student's own.
- `loss_on_prompt`: whether rows of the prompt count. `loss_on_last_token`: whether the row after the last token counts,
  which no target follows, as in code that compares distributions without shifting them.

The recipe, `paper_recipe/…`, is how teachers and students alike were trained (the released `finetune.py` and
`train_args.json`); it and an objective go together as `preset: [paper_recipe/math, paper_code/seq_kd]`. Weights are
bfloat16 here where the authors used float16 with 8-bit preparation, and the learning rate begins one step above 0.

The temperature and the noise are what the paper varies (T in 1, 2, 5; σ in 0, 1, 2, 5); the released GKD ignores T.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tutelage.config import overlay
from tutelage.errors import ConfigurationError
from tutelage.trainer.losses.registry import Setting

Preset = Mapping[str, Setting | tuple[Setting, ...]]

_RELEASED_OFF_POLICY: dict[str, Setting] = {
    "objective.on_policy_fraction": 0.0,
    "objective.scale_by_temperature_squared": True,
    "reduction": "sequence_mean",
    "loss_on_prompt": True,
    "loss_on_last_token": True,
}
_PRINTED: dict[str, Setting] = {
    "objective.scale_by_temperature_squared": False,
    "reduction": "token_mean",
    "loss_on_prompt": False,
    "loss_on_last_token": False,
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "paper_code/seq_kd": {"objective.name": "paper_code/forward_kl", **_RELEASED_OFF_POLICY},
        "paper_code/rev_kd": {"objective.name": "paper_code/reverse_kl", **_RELEASED_OFF_POLICY},
        "paper_code/gkd": {
            "objective.name": "paper_code/gkd",
            "objective.beta": 0.5,
            "objective.temperature": 1.0,
            "objective.scale_by_temperature_squared": False,
            "objective.on_policy_fraction": 0.5,
            "on_policy_unit": "micro_batch",
            "sampling.temperature": 1.0,
            "sampling.top_p": 1.0,
            "reduction": "micro_batch_token_mean",
            # The released code compares distributions without shifting them, so the row after the last token counts.
            "loss_on_prompt": True,
            "loss_on_last_token": True,
        },
        "paper_text/seq_kd": {"objective.name": "seq_kd", "objective.on_policy_fraction": 0.0, **_PRINTED},
        "paper_text/rev_kd": {"objective.name": "reverse_kl", "objective.on_policy_fraction": 0.0, **_PRINTED},
        "paper_text/gkd": {
            "objective.name": "gkd",
            "objective.beta": 0.5,
            "objective.on_policy_fraction": 0.5,
            "on_policy_unit": "sequence",
            "sampling.temperature": 1.0,
            **_PRINTED,
        },
    }
)

_RECIPE: Preset = {
    "data.template": "alpaca_leaked_indentation_training",
    "lora.r": 8,
    "lora.lora_alpha": 16.0,
    "lora.lora_dropout": 0.05,
    "lora.target_modules": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    "optimizer.learning_rate": 3e-4,
    "optimizer.warmup_steps": 100,
    "optimizer.lr_scheduler_type": "linear",
    "optimizer.weight_decay": 0.0,
    # transformers' defaults, where ours are 0.9 and 0.95.
    "optimizer.betas": (0.9, 0.999),
    "optimizer.max_grad_norm": 1.0,
    "batch.sequences": 16,
    "batch.micro_batch_sequences": 4,
    "batch.max_tokens": 256,
    "sampling.max_new_tokens": 256,
    "held_out.sequences": 500,
    "held_out.every_steps": 200,
    "save_every_steps": 200,
    "keep_checkpoints": 3,
    "best.metric": "heldout/cross_entropy",
    "loss_on_prompt": True,
    "seed": 6,
}

RECIPES: Mapping[str, Preset] = MappingProxyType(
    {
        "paper_recipe/math": {**_RECIPE, "epochs": 4},
        "paper_recipe/commonsense": {**_RECIPE, "epochs": 3},
    }
)


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigurationError: there is none; names the nearest.

    """
    known = {**PRESETS, **RECIPES}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigurationError(f"{name!r} is none of {', '.join(known)}{hint}", "preset")
    return known[name]


def with_presets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over the presets that their `preset` names, a later preset over an earlier one.

    Raises:
        ConfigurationError: as `preset_named`.

    """
    # A list in its long form, which a preset's template lies under; one data set takes the place of several.
    data = values.get("data")
    if isinstance(data, list | tuple):
        values = {**values, "data": {"path": None, "sources": data}}
    elif isinstance(data, Mapping) and data.get("path") is not None:
        values = {**values, "data": {"sources": [], **data}}
    names = values.get("preset") or ()
    settings: dict[str, Any] = {}
    for name in [names] if isinstance(names, str) else names:
        settings = overlay(settings, as_settings(preset_named(name)))
    return overlay(settings, values)


def as_settings(preset: Preset) -> dict[str, Any]:
    """Its dotted paths as nested mappings."""
    settings: dict[str, Any] = {}
    for path, value in preset.items():
        *parents, key = path.split(".")
        section = settings
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    return settings
