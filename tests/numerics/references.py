"""The objectives in numpy and float64, from probabilities, atom by atom, as their papers write them.

Written apart from the project's code and sharing nothing with it. p is the teacher, q the student.
"""

from __future__ import annotations

import math

import numpy as np


def softmax(logits, temperature=1.0):
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def kl(a, b):
    total = 0.0
    for a_i, b_i in zip(a, b, strict=True):
        if a_i > 0:
            total += a_i * math.log(a_i / b_i) if b_i > 0 else math.inf
    return total


def forward_kl(p, q):
    return kl(p, q)


def reverse_kl(p, q):
    return kl(q, p)


def gkd(p, q, beta=0.5, normalize_beta=False):
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return value / (beta * (1 - beta)) if normalize_beta else value


def jsd(p, q):
    m = (p + q) / 2
    return kl(p, m) / 2 + kl(q, m) / 2


def skew_kl(p, q, alpha=0.1):
    return kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse_kl(p, q, alpha=0.1):
    return kl(q, (1 - alpha) * p + alpha * q)


def tvd(p, q):
    return sum(abs(p_i - q_i) for p_i, q_i in zip(p, q, strict=True)) / 2


def adaptive_kl(p, q, head_mass=0.5):
    order = sorted(range(len(p)), key=lambda i: -p[i])
    head, mass = [order[0]], p[order[0]]
    for i in order[1:]:
        mass += p[i]
        if mass > head_mass:
            break
        head.append(i)
    gap_of_head = sum(abs(p[i] - q[i]) for i in head)
    gap = sum(abs(p_i - q_i) for p_i, q_i in zip(p, q, strict=True))
    share = gap_of_head / gap if gap > 0 else 0.5
    return share * kl(p, q) + (1 - share) * kl(q, p)


def released_forward_kl(p, q):
    return float(np.sum((p + 1e-9) * (np.log(p + 1e-9) - np.log(q))))


def released_reverse_kl(p, q):
    return float(np.sum((q + 1e-9) * (np.log(q) - np.log(p))))


def released_gkd(p, q, beta=0.5):
    m = beta * q + (1 - beta) * p
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


BY_NAME = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "gkd": gkd,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "adaptive_kl": adaptive_kl,
    "paper_code/forward_kl": released_forward_kl,
    "paper_code/reverse_kl": released_reverse_kl,
    "paper_code/gkd": released_gkd,
}


def bucketed(probabilities, ids):
    """Kept ids and all the rest as one atom."""
    kept = [i for i in ids if i >= 0]
    rest = [i for i in range(len(probabilities)) if i not in set(kept)]
    return np.array([*(probabilities[i] for i in kept), sum(probabilities[i] for i in rest)])
