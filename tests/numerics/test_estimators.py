"""Each estimator's expectation, summed over the whole vocabulary, has the gradient that its name says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from numerics.cases import make_case
from trainer_cases import student_config
from tutelage.errors import ConfigurationError
from tutelage.trainer.losses import divergences, estimators
from tutelage.trainer.losses.diagnostics import sampler_divergence
from tutelage.trainer.losses.losses import token_divergence, token_policy_gradient
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution, counter_normal
from tutelage.trainer.teacher.rows import CandidateRows
from tutelage.trainer.training.objective import teacher_distribution_of

GRADIENT_OF = {
    "policy_gradient": divergences.reverse_kl,
    "k2_reverse_kl": divergences.reverse_kl,
    "k3_forward_kl": divergences.forward_kl,
}


def expectation(loss_of_logps, student_logits, teacher_logp):
    """E over tokens of the student: Σ_v q(v)·loss(v), with q as constant weights."""
    student_logp = student_logits.log_softmax(-1)
    return (student_logp.detach().exp() * loss_of_logps(student_logp, teacher_logp)).sum()


@pytest.fixture
def logits():
    case = make_case(rows=3)
    return case.student_logits.requires_grad_(), case.teacher_logits.log_softmax(-1)


@pytest.mark.parametrize("name", GRADIENT_OF)
def test_expected_gradient_is_that_of_the_divergence_in_the_name(name, logits):
    student, teacher_logp = logits
    (found,) = torch.autograd.grad(expectation(getattr(estimators, name), student, teacher_logp), student)
    divergence = GRADIENT_OF[name](teacher_logp, student.log_softmax(-1))
    (expected,) = torch.autograd.grad(divergence.sum(), student)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["policy_gradient", "k3_forward_kl"])
def test_expected_value_is_the_reverse_kl(name, logits):
    student, teacher_logp = logits
    found = expectation(getattr(estimators, name), student, teacher_logp)
    expected = divergences.reverse_kl(teacher_logp, student.log_softmax(-1)).sum()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_gauge_of_the_sampler_is_its_divergence_from_the_student_in_expectation(temperature):
    """Every token of the vocabulary as if it were drawn, weighed with the sampler's own probability; float64 sums."""
    case = make_case(rows=3)
    rows, ids = case.student_logits.shape
    student_logp = (case.student_logits / temperature).log_softmax(-1)
    sampler_logp = (case.teacher_logits / temperature).log_softmax(-1)
    drawn = torch.arange(ids).repeat(rows)

    def gauge(logp_of_drawn):
        hidden = case.hidden_ND.repeat_interleave(ids, 0)
        found = sampler_divergence(hidden, case.head, drawn, logp_of_drawn.flatten(), temperature=temperature)
        return found.reshape(rows, ids)

    expected = (sampler_logp.exp() * (sampler_logp - student_logp)).sum(-1)
    torch.testing.assert_close((sampler_logp.exp() * gauge(sampler_logp)).sum(-1), expected)
    assert (gauge(sampler_logp) >= 0).all()
    assert gauge(student_logp).abs().max() < 1e-12


@pytest.mark.parametrize("name", GRADIENT_OF)
def test_another_sampler_is_corrected_by_importance_weights(name, logits):
    student, teacher_logp = logits
    student_logp = student.log_softmax(-1)
    sampler_logp = (student.detach() + torch.linspace(-1, 1, 23, dtype=torch.float64)).log_softmax(-1)
    weights = estimators.importance_weights(student_logp, sampler_logp)
    loss = (sampler_logp.exp() * weights * getattr(estimators, name)(student_logp, teacher_logp)).sum()
    (found,) = torch.autograd.grad(loss, student)
    (expected,) = torch.autograd.grad(GRADIENT_OF[name](teacher_logp, student.log_softmax(-1)).sum(), student)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("estimator", GRADIENT_OF)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_token_policy_gradient_from_hidden_and_from_target_logits(estimator, temperature):
    case = make_case()
    ids = torch.arange(7)
    weights = torch.linspace(-1, 1, 7, dtype=torch.float64)
    candidates = case.candidates(3, temperature)
    candidates = CandidateRows(
        candidates.ids_NC,
        candidates.logits_NC,
        candidates.logsumexp_N,
        target_logits_N=case.teacher_logits.gather(-1, ids[:, None])[:, 0],
    )
    distribution = TeacherDistribution(temperature=temperature)
    teacher_logp = (case.teacher_logits / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    hidden = case.hidden_ND.requires_grad_()
    student_logits = hidden @ case.head.matrix_VD.T / temperature
    student_logp = student_logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    expected = getattr(estimators, estimator)(student_logp, teacher_logp)
    for teacher in (case.teacher, candidates):
        value, _ = token_policy_gradient(
            hidden, case.head, teacher, ids, estimator=estimator, distribution=distribution, chunk_rows=3
        )
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad((value * weights).sum(), hidden),
            torch.autograd.grad((expected * weights).sum(), hidden, retain_graph=True),
        )


def test_noise_reaches_the_reward():
    case = make_case()
    ids = torch.zeros(7, dtype=torch.int64)
    distribution = TeacherDistribution(noise=2.0, noise_seed=4)
    value = token_policy_gradient(case.hidden_ND, case.head, case.teacher, ids, distribution=distribution)[0]
    noise = counter_normal(4, case.teacher.sequence_digest_N, case.teacher.position_N, 23)
    teacher_logp = (case.teacher_logits + 2.0 * noise).log_softmax(-1)[:, 0]
    torch.testing.assert_close(value, case.student_logits.log_softmax(-1)[:, 0] - teacher_logp)


def test_k1_as_a_loss_is_refused():
    case = make_case()
    with pytest.raises(ConfigurationError, match="expected gradient of 0"):
        token_policy_gradient(
            case.hidden_ND, case.head, case.teacher, torch.zeros(7), estimator="k1", distribution=TeacherDistribution()
        )


def test_estimates_from_samples_agree_within_five_standard_errors():
    case = make_case(rows=1)
    student, teacher = case.student_logits.log_softmax(-1), case.teacher_logits.log_softmax(-1)
    ids = torch.multinomial(student[0].exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    exact = divergences.reverse_kl(teacher, student).item()
    for estimator in (estimators.policy_gradient, estimators.k3_forward_kl):
        samples = estimator(student[0, ids], teacher[0, ids])
        assert abs(samples.mean().item() - exact) < 5 * samples.std().item() / math.sqrt(len(ids))


SETTINGS = [
    {"objective": {"temperature": temperature, "student_temperature": own}, "sampling": {"temperature": own}}
    for temperature, own in ((1.0, 1.0), (2.0, 2.0), (0.5, 0.5), (2.0, 1.0), (1.0, 0.7))
] + [{}, {"objective": {"scale_by_temperature_squared": True}}, {"objective": {"noise": 1.5}}]
SETTINGS += [
    {"objective": {"importance_weights": True, "temperature": T}, "sampling": {"temperature": sampling}}
    for T, sampling in ((1.0, 2.0), (2.0, 1.0), (1.0, 0.5), (1.0, 1.0))
]
WRONG = {
    "another temperature": ({"objective": {"temperature": 2.0}}, "sampling.temperature", "allowed is 2.0"),
    "a colder sample": ({"sampling": {"temperature": 0.5}}, "sampling.temperature", "allowed is 1.0"),
    "the teacher's temperature": (
        {"objective": {"temperature": 2.0, "student_temperature": 1.5}, "sampling": {"temperature": 2.0}},
        "sampling.temperature",
        "allowed is 1.5",
    ),
    "a nucleus": ({"sampling": {"top_p": 0.7}}, "sampling.top_p", "allowed is 1"),
    "tokens of the prompt": ({"loss_on_prompt": True}, "loss_on_prompt", "allowed is false"),
    "a nucleus, weighed": (
        {"objective": {"importance_weights": True}, "sampling": {"top_p": 0.7}},
        "sampling.top_p",
        "allowed is 1",
    ),
    "a penalty": ({"sampling": {"repetition_penalty": 1.2}}, "sampling.repetition_penalty", "allowed is 1"),
    "older weights": ({"sampling": {"max_staleness": 1}}, "sampling.max_staleness", "importance_weights"),
    "a clip that is not said": (
        {"objective": {"importance_weights": True, "importance_clip": 5.0}},
        "importance_clip",
        "approximate: true",
    ),
    "a clip of nothing": ({"objective": {"importance_clip": 5.0}}, "importance_clip", "importance_weights: true"),
    "weights of another objective": (
        {"objective": {"name": "gkd", "importance_weights": True}},
        "importance_weights",
        "sampled tokens",
    ),
}


def sampled_token_config(**changes):
    objective = {"name": "policy_gradient_kl", "signal": "hidden"} | changes.pop("objective", {})
    return student_config(Path("student"), Path("rows.jsonl"), objective=objective, **changes)


@pytest.mark.parametrize("estimator", ["policy_gradient", "k2_reverse_kl", "k3_forward_kl"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_over_what_is_sampled_the_estimate_is_the_exact_gradient(settings, estimator):
    """Every token enumerated, each weighed with the probability with which the sampler draws it."""
    settings = {key: dict(value) for key, value in settings.items()}
    objective = settings.pop("objective", {}) | {"estimator": estimator}
    config = sampled_token_config(objective=objective, **settings)
    distribution = teacher_distribution_of(config.objective, noise_seed=3)
    case = make_case(rows=6, vocabulary=11)
    hidden = case.hidden_ND.clone().requires_grad_()
    sampled = (case.student_logits / config.sampling.temperature).softmax(-1).detach()
    weighed = config.objective.importance_weights
    expected = 0.0
    for token in range(11):
        ids = torch.full((6,), token)
        value, _ = token_policy_gradient(
            hidden,
            case.head,
            case.teacher,
            ids,
            estimator=estimator,
            sampler_logp_N=sampled[:, token].log() if weighed else None,
            distribution=distribution,
        )
        expected = expected + (sampled[:, token] * value).sum()
    (found,) = torch.autograd.grad(expected, hidden)
    name = "forward_kl" if estimator == "k3_forward_kl" else "reverse_kl"
    exact = token_divergence(hidden, case.head, case.teacher, objective=name, distribution=distribution)
    (wanted,) = torch.autograd.grad(exact.sum(), hidden)
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) >= 0.999
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", WRONG)
def test_samples_of_another_distribution_are_refused(name):
    settings, field, allowed = WRONG[name]
    with pytest.raises(ValidationError, match=rf"{field}: .*{allowed}"):
        sampled_token_config(**{key: dict(each) if isinstance(each, dict) else each for key, each in settings.items()})


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.0, 1.5), (1.5, 1.0)], ids=str)
def test_the_gradient_of_samples_is_the_exact_one_within_its_monte_carlo_error(temperatures):
    """Tokens drawn, as a run draws them: the error falls as the samples say, and the direction is the exact one's."""
    T, sampling = temperatures
    distribution = TeacherDistribution(temperature=T)
    case = make_case(rows=1, vocabulary=11)
    hidden = case.hidden_ND.clone().requires_grad_()
    exact = token_divergence(hidden, case.head, case.teacher, objective="reverse_kl", distribution=distribution)
    (wanted,) = torch.autograd.grad(exact.sum(), hidden)
    sampler_logp = (case.student_logits / sampling).log_softmax(-1)[0]
    count = 200_000
    ids = torch.multinomial(sampler_logp.exp(), count, replacement=True, generator=torch.Generator().manual_seed(1))
    # The gradient of each token of the vocabulary is that of each sample of it.
    each = []
    for token in range(11):
        value, weight = token_policy_gradient(
            hidden, case.head, case.teacher, torch.tensor([token]), sampler_logp_N=sampler_logp[[token]],
            distribution=distribution,
        )  # fmt: skip
        each.append(torch.cat([torch.autograd.grad(value.sum(), hidden)[0][0], weight]))
    samples = torch.stack(each)[ids]
    mean, error = samples.mean(0), samples.std(0) / math.sqrt(count)
    assert torch.cosine_similarity(mean[:-1], wanted[0], dim=0) >= 0.999
    assert (mean[:-1] - wanted[0]).norm() < 4 * error[:-1].norm()
    assert abs(mean[-1] - 1.0) <= 4 * error[-1]


def test_a_clip_cuts_the_weights_that_are_above_it():
    case = make_case(rows=3)
    ids = torch.tensor([1, 2, 3])
    own = case.student_logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    sampler = own - torch.tensor([0.0, 3.0, -1.0], dtype=torch.float64)
    given = {"sampler_logp_N": sampler, "distribution": TeacherDistribution()}
    whole, weight = token_policy_gradient(case.hidden_ND, case.head, case.teacher, ids, **given)
    cut, unclipped = token_policy_gradient(case.hidden_ND, case.head, case.teacher, ids, importance_clip=2.0, **given)
    torch.testing.assert_close(weight, torch.tensor([0.0, 3.0, -1.0], dtype=torch.float64).exp())
    torch.testing.assert_close(unclipped, weight)
    torch.testing.assert_close(cut / whole, weight.clamp(max=2.0) / weight)


def test_a_constant_advantage_has_no_gradient_in_expectation_and_one_in_every_sample(logits):
    """The reward −1 of every token: Σ_v q(v)·∇ln q(v) = ∇Σ_v q(v) = 0, whatever the teacher says."""
    student, teacher_logp = logits
    (found,) = torch.autograd.grad(expectation(estimators.constant_advantage, student, teacher_logp), student)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0.0, atol=1e-14)
    student_logp = student.log_softmax(-1)[:, 0]
    value = estimators.constant_advantage(student_logp, teacher_logp[:, 0])
    torch.testing.assert_close(value, torch.ones_like(value))
    (of_sample,) = torch.autograd.grad(value.sum(), student)
    (of_logp,) = torch.autograd.grad(student.log_softmax(-1)[:, 0].sum(), student)
    torch.testing.assert_close(of_sample, of_logp)
