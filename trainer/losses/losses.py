"""The losses: a value per row from the student's hidden states and what the teacher said about the same rows.

Rows are the scored positions, chosen before: no function takes a mask. Logits exist for one chunk of rows at a time
(`chunked`), and never the gradient of a chunk beside the next.

Shapes: the legend in docs/architecture.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from tutelage.errors import ConfigurationError
from tutelage.trainer.losses import closed_forms, divergences, estimators
from tutelage.trainer.losses import released_code as paper
from tutelage.trainer.losses.chunked import RowFunction, evaluate_rows
from tutelage.trainer.losses.closed_forms import Divergence, ValueAndGradient
from tutelage.trainer.losses.logit_functions import FullVocabulary, KeptIdsAndTail, TeacherTokenLogp, TokenLogp
from tutelage.trainer.losses.registry import Setting, check_signal, resolve_parameters
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import HiddenRows, TeacherRows, Unembedding

DEFAULT_CHUNK_ROWS = 512
"""Rows of logits that exist at once: 512 of 49,152 float32 logits are 96 MiB."""


def token_divergence(
    student_hidden_ND: Tensor,
    student_head: Unembedding,
    teacher: TeacherRows,
    *,
    objective: str,
    parameters: Mapping[str, Setting] | None = None,
    distribution: TeacherDistribution,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    approximate: bool = False,
) -> Tensor:
    """The objective's divergence per row, float32 [N] in nats (times T² if `distribution` says so).

    Gradients flow to the hidden states and to the head's matrix and bias.

    Args:
        student_hidden_ND: final hidden states [N, D], the head's input.
        student_head: the student's, over the same vocabulary as the teacher's.
        teacher: the same rows of the teacher.
        objective: a name of `registry.OBJECTIVES` that compares distributions.
        parameters: of the objective; the rest by default.
        distribution: temperatures, noise, truncation.
        chunk_rows: rows of logits that exist at once.
        approximate: accept a signal that serves the objective only approximately.

    Raises:
        ConfigurationError: the signal does not serve the objective, or the vocabularies differ in size.

    """
    given = resolve_parameters(objective, parameters or {})
    divergence = divergence_named(objective, given)
    check_signal(
        objective,
        teacher.kind,
        parameters=given,
        noise=distribution.noise,
        truncates=distribution.truncates,
        approximate=approximate,
    )
    function: RowFunction
    if isinstance(teacher, HiddenRows):
        check_same_vocabulary(student_head, teacher)
        # A truncated teacher has atoms of probability 0, which the closed forms do not treat.
        fast = _closed_form(objective, given) if not distribution.truncates else None
        function = FullVocabulary(teacher, distribution, fast or closed_forms.by_autograd(divergence))
    else:
        function = KeptIdsAndTail(teacher, distribution, divergence, student_head.vocabulary_size)
    value_N = evaluate_rows(student_hidden_ND, student_head, function, chunk_rows=chunk_rows)
    return value_N if distribution.loss_factor == 1.0 else value_N * distribution.loss_factor


def token_cross_entropy(
    student_hidden_ND: Tensor, student_head: Unembedding, targets_N: Tensor, *, chunk_rows: int = DEFAULT_CHUNK_ROWS
) -> Tensor:
    """−ln q(target), float32 [N] in nats, at temperature 1: the objectives `sft` and `seq_kd`."""
    return -evaluate_rows(student_hidden_ND, student_head, TokenLogp(targets_N, 1.0), chunk_rows=chunk_rows)


def token_policy_gradient(
    student_hidden_ND: Tensor,
    student_head: Unembedding,
    teacher: TeacherRows,
    sampled_ids_N: Tensor,
    *,
    estimator: str = "policy_gradient",
    sampler_logp_N: Tensor | None = None,
    importance_clip: float | None = None,
    distribution: TeacherDistribution,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> tuple[Tensor, Tensor | None]:
    """The objective `policy_gradient_kl`, float32 [N] (times T² if `distribution` says so); see `estimators`.

    With `sampler_logp_N` each value is multiplied by its importance weight, and these, before they are clipped, are the
    second result, [N].

    Args:
        student_hidden_ND: as in `token_divergence`.
        student_head: as in `token_divergence`.
        teacher: as in `token_divergence`; `topk` and `candidates` need `target_logits_N`.
        sampled_ids_N: int64, the token that the student sampled at each row.
        estimator: `policy_gradient`, `k2_reverse_kl`, `k3_forward_kl` or `constant_advantage`.
        sampler_logp_N: ln of the probability with which each of those tokens was drawn. None takes them as drawn from
            the very distribution that is compared.
        importance_clip: the largest weight; truncated importance sampling (Ionides, J. Comput. Graph. Stat. 2008) has
            less variance, and a bias.
        distribution: temperatures and noise.
        chunk_rows: as in `token_divergence`.

    Raises:
        ConfigurationError: the estimator is unknown, or noise or truncation is asked of another signal than `hidden`.

    """
    parameters = {"estimator": estimator}
    check_signal(
        "policy_gradient_kl",
        teacher.kind,
        parameters=parameters,
        noise=distribution.noise,
        truncates=distribution.truncates,
    )
    teacher_logp_N = teacher_token_logp(teacher, sampled_ids_N, distribution=distribution, chunk_rows=chunk_rows)
    function = TokenLogp(sampled_ids_N, distribution.temperature_of_student)
    student_logp_N = evaluate_rows(student_hidden_ND, student_head, function, chunk_rows=chunk_rows)
    value_N: Tensor = getattr(estimators, estimator)(student_logp_N, teacher_logp_N)
    value_N = value_N * distribution.loss_factor
    if sampler_logp_N is None:
        return value_N, None
    weight_N = estimators.importance_weights(student_logp_N, sampler_logp_N)
    return value_N * weight_N.clamp(max=importance_clip or math.inf), weight_N


def teacher_token_logp(
    teacher: TeacherRows, ids_N: Tensor, *, distribution: TeacherDistribution, chunk_rows: int
) -> Tensor:
    """Ln p of one id per row under the teacher distribution, float32 [N]; of `topk` and `candidates` the targets."""
    if isinstance(teacher, HiddenRows):
        function = TeacherTokenLogp(ids_N, teacher, distribution)
        with torch.no_grad():
            return evaluate_rows(teacher.hidden_ND, teacher.unembedding, function, chunk_rows=chunk_rows)
    assert teacher.target_logits_N is not None
    return teacher.target_logits_N / distribution.temperature - teacher.logsumexp_N


def divergence_named(objective: str, parameters: Mapping[str, Setting]) -> Divergence:
    """The definition that a name and resolved parameters stand for, of (teacher_logp, student_logp).

    Raises:
        ConfigurationError: the objective does not compare distributions.

    """
    plain: dict[str, Callable[..., Tensor]] = {
        "forward_kl": divergences.forward_kl,
        "reverse_kl": divergences.reverse_kl,
        "gkd": divergences.generalized_jsd,
        "jsd": partial(divergences.generalized_jsd, beta=0.5),
        "skew_kl": divergences.skew_kl,
        "skew_reverse_kl": divergences.skew_reverse_kl,
        "tvd": divergences.total_variation,
        "adaptive_kl": divergences.adaptive_kl,
        "paper_code/forward_kl": paper.released_forward_kl,
        "paper_code/reverse_kl": paper.released_reverse_kl,
        "paper_code/gkd": paper.released_jsd,
    }
    if objective not in plain:
        raise ConfigurationError(f"{objective} compares no distributions; use one of {', '.join(plain)}", "objective")
    return partial(plain[objective], **parameters)


def check_same_vocabulary(student_head: Unembedding, teacher: HiddenRows) -> None:
    """Refuses heads over vocabularies of different sizes, such as with padded rows on one side.

    Raises:
        ConfigurationError: names both sizes.

    """
    student, theirs = student_head.vocabulary_size, teacher.unembedding.vocabulary_size
    if student != theirs:
        raise ConfigurationError(
            f"the student's head has {student} rows, the teacher's {theirs}; cut both to the tokenizer's vocabulary"
        )


def _closed_form(objective: str, parameters: Mapping[str, Setting]) -> ValueAndGradient | None:
    beta = 0.5 if objective == "jsd" else parameters.get("beta")
    if objective == "forward_kl" or (objective == "gkd" and beta == 0.0):
        return closed_forms.forward_kl
    if objective == "reverse_kl" or (objective == "gkd" and beta == 1.0):
        return closed_forms.reverse_kl
    if objective in ("gkd", "jsd"):
        return closed_forms.generalized_jsd(cast(float, beta), bool(parameters.get("normalize_beta", False)))
    return None
