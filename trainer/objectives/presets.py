"""Settings of "On the generalization vs fidelity paradox in knowledge distillation", by name.

Ramesh, Sengupta, Chakraborty, Findings of ACL 2025, arXiv 2505.15442. `paper_code/…` is what the released code does,
`paper_text/…` what the paper prints; they disagree. Keys are dotted paths of settings:

- `objective.…`: the name and parameters of the objective, what smooths it, the share of the student's own sequences.
- `reduction`: `token_mean` and `sequence_mean` as in `reductions`; `micro_batch_token_mean` is the mean of the
  micro-batches' token means.
- `on_policy_unit`: whether each `sequence` or each `micro_batch` as a whole is drawn to be the student's own.
- `loss_on_prompt`: whether rows of the prompt count. `loss_on_last_token`: whether the row after the last token counts,
  which no target follows, as in code that compares distributions without shifting them.

The temperature and the noise are what the paper varies (T in 1, 2, 5; σ in 0, 1, 2, 5); the released GKD ignores T.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from trainer.objectives.table import Setting

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

PRESETS: Mapping[str, Mapping[str, Setting]] = MappingProxyType(
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
