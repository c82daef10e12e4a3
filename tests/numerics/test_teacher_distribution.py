"""Noise, temperature and truncation: what each number means, and that noise depends on nothing but its key."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from numerics.cases import make_case
from tutelage.trainer.losses.losses import token_divergence
from tutelage.trainer.losses.tail_bucket import teacher_bucketed_logp
from tutelage.trainer.losses.teacher_distribution import (
    TeacherDistribution,
    counter_normal,
    counter_normal_at,
    keep_top_k,
    keep_top_p,
    philox,
    teacher_distribution_logits,
)

DIGEST = torch.tensor([7, -(2**63), 2**63 - 1, 0, -1])
POSITION = torch.tensor([0, 5, 2**32 - 1, 17, 3])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    found = philox(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in found] == [int(word, 16) for word in words.split()]


def scalar_normal(seed, digest, position, vocabulary_id):
    """The noise of one id, by Python's integers and floats."""
    mask = 0xFFFFFFFF
    digest %= 2**64
    c = [vocabulary_id // 4, position, digest & mask, digest >> 32]
    k = [seed & mask, seed >> 32]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & mask, (first >> 32) ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    pair = c[:2] if vocabulary_id % 4 < 2 else c[2:]
    radius = math.sqrt(-2 * math.log((pair[0] + 0.5) / 2**32))
    angle = 2 * math.pi * pair[1] / 2**32
    return radius * (math.sin(angle) if vocabulary_id % 2 else math.cos(angle))


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_noise_equals_a_scalar_reference(seed):
    noise = counter_normal(seed, DIGEST, POSITION, 11)
    for row, (digest, position) in enumerate(zip(DIGEST.tolist(), POSITION.tolist(), strict=True)):
        expected = [scalar_normal(seed, digest, position, i) for i in range(11)]
        np.testing.assert_allclose(noise[row].numpy(), expected, rtol=2e-5, atol=2e-6)


def test_noise_is_standard_normal_and_uncorrelated():
    noise = counter_normal(3, torch.arange(100), torch.arange(100), 1000).double().numpy()
    n = noise.size
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(noise, axis=None)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(noise, axis=None)) < 5 * math.sqrt(24 / n)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-4
    for first, second in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:]), (noise[:, ::2], noise[:, 1::2])):
        assert abs(np.mean(first * second)) < 5 / math.sqrt(first.size)


def test_noise_depends_on_seed_sequence_position_and_id_only():
    everything = counter_normal(1, DIGEST, POSITION, 1000)
    assert torch.equal(everything, counter_normal(1, DIGEST, POSITION, 1000))
    for rows in (slice(1, 2), torch.tensor([4, 0, 2])):
        assert torch.equal(counter_normal(1, DIGEST[rows], POSITION[rows], 1000), everything[rows])
    assert torch.equal(counter_normal(1, DIGEST, POSITION, 37), everything[:, :37])
    ids = torch.tensor([[999, 0, 3]]).expand(5, 3)
    assert torch.equal(counter_normal_at(1, DIGEST, POSITION, ids), everything.gather(-1, ids))


@pytest.mark.parametrize("change", ["seed", "high word of the seed", "digest", "high word of the digest", "position"])
def test_another_key_gives_other_noise(change):
    plain = counter_normal(1, DIGEST, POSITION, 1000)
    seed = {"seed": 2, "high word of the seed": 1 + 2**32}.get(change, 1)
    digest = DIGEST ^ {"digest": 1, "high word of the digest": 2**32}.get(change, 0)
    other = counter_normal(seed, digest, POSITION ^ int(change == "position"), 1000)
    correlation = torch.corrcoef(torch.stack([plain.flatten(), other.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(5000)


def test_sigma_zero_is_bit_identical_to_no_noise():
    case = make_case(dtype=torch.float32)
    rows = [
        token_divergence(
            case.hidden_ND,
            case.head,
            case.teacher,
            objective="gkd",
            distribution=TeacherDistribution(noise=0.0, noise_seed=seed),
        )
        for seed in (0, 9)
    ]
    assert torch.equal(*rows)
    logits = case.teacher_logits
    untouched = teacher_distribution_logits(
        logits.clone(), case.teacher.sequence_digest_N, case.teacher.position_N, TeacherDistribution()
    )
    assert torch.equal(untouched, logits)


def test_noise_is_added_before_the_temperature():
    case = make_case()
    teacher = case.teacher
    distribution = TeacherDistribution(temperature=4.0, noise=2.0, noise_seed=5)
    found = teacher_distribution_logits(
        case.teacher_logits, teacher.sequence_digest_N, teacher.position_N, distribution
    )
    noise = counter_normal(5, teacher.sequence_digest_N, teacher.position_N, 23)
    torch.testing.assert_close(found, (case.teacher_logits + 2.0 * noise) / 4.0)


@pytest.mark.parametrize("chunk_rows", [1, 3, 40])
def test_noise_is_the_same_in_every_chunking_and_batch(chunk_rows):
    case = make_case(rows=40)
    arguments = {"objective": "reverse_kl", "distribution": TeacherDistribution(noise=3.0, noise_seed=8)}
    whole = token_divergence(case.hidden_ND, case.head, case.teacher, **arguments)
    chunked = token_divergence(case.hidden_ND, case.head, case.teacher, **arguments, chunk_rows=chunk_rows)
    part = token_divergence(case.hidden_ND[7:19], case.head, case.teacher.at(slice(7, 19)), **arguments)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(part, whole[7:19], rtol=1e-12, atol=1e-14)
    silent = token_divergence(
        case.hidden_ND, case.head, case.teacher, objective="reverse_kl", distribution=TeacherDistribution()
    )
    assert not torch.allclose(whole, silent, rtol=0.1)


def test_approximate_noise_on_topk_knows_the_kept_ids_and_the_mean_of_the_tail():
    case = make_case(rows=50, vocabulary=4000)
    teacher, distribution = case.topk(10, temperature=2.0), TeacherDistribution(temperature=2.0, noise=2.0)
    digest, position = case.teacher.sequence_digest_N, case.teacher.position_N
    exact = (
        teacher_distribution_logits(case.teacher_logits, digest, position, distribution)
        .softmax(-1)
        .gather(-1, teacher.ids_NK)
    )
    found = teacher_bucketed_logp(teacher, 4000, distribution).exp()
    torch.testing.assert_close(found.sum(-1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(found[:, :-1], exact, rtol=0.1, atol=1e-4)
    silent = teacher_bucketed_logp(teacher, 4000, replace(distribution, noise=0.0)).exp()
    assert not torch.allclose(silent[:, :-1], exact, rtol=0.5, atol=1e-4)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]).log()
    assert torch.equal(keep_top_k(logits, 2).isfinite(), torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]]).bool())
    assert torch.equal(keep_top_k(logits, 4), logits)
    for p, kept in ((0.39, 1), (0.41, 2), (0.71, 3), (1e-6, 1)):
        assert keep_top_p(logits[:1], p).isfinite().sum() == kept
    torch.testing.assert_close(keep_top_p(logits, 0.6).softmax(-1)[0], torch.tensor([4 / 7, 0, 3 / 7, 0]))


@pytest.mark.parametrize("objective", ["forward_kl", "gkd", "skew_kl", "tvd"])
@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 5, "top_p": 0.6}])
def test_a_truncated_teacher_has_finite_losses_and_gradients(objective, cut):
    case = make_case()
    hidden = case.hidden_ND.requires_grad_()
    distribution = TeacherDistribution(temperature=2.0, **cut)
    value = token_divergence(hidden, case.head, case.teacher, objective=objective, distribution=distribution)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), hidden)[0].isfinite().all()
    whole = token_divergence(
        hidden, case.head, case.teacher, objective=objective, distribution=TeacherDistribution(temperature=2.0)
    )
    assert (value > whole).any()
