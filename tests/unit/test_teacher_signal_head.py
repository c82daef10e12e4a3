"""The signal head against the formulas written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.teacher_server.signals import logit_head as signal_head
from tutelage.teacher_server.signals.logit_head import SignalHead, group_maxima, largest
from tutelage.teacher_server.signals.unembedding import Unembedding

VOCABULARY, HIDDEN, ROWS = 1000, 24, 37
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(VOCABULARY, HIDDEN, generator=GENERATOR).bfloat16()
BIAS = torch.randn(VOCABULARY, generator=GENERATOR)
STATES = (3 * torch.randn(ROWS, HIDDEN, generator=GENERATOR)).bfloat16()
TARGETS = torch.randint(VOCABULARY, (ROWS,), generator=GENERATOR).tolist()

HEADS = {
    "plain": {"bias_V": None, "scale": 1.0, "softcap": 0.0},
    "bias": {"bias_V": BIAS, "scale": 1.0, "softcap": 0.0},
    "scale": {"bias_V": None, "scale": 0.0625, "softcap": 0.0},
    "softcap": {"bias_V": None, "scale": 1.0, "softcap": 30.0},
    "all": {"bias_V": BIAS, "scale": 0.25, "softcap": 5.0},
}


def reference_logits(bias_V: torch.Tensor | None, scale: float, softcap: float) -> np.ndarray:
    logits = STATES.double().numpy() @ WEIGHT.double().numpy().T
    if bias_V is not None:
        logits = logits + bias_V.double().numpy()
    logits = logits * scale
    return softcap * np.tanh(logits / softcap) if softcap else logits


def reference_logsumexp(logits: np.ndarray, temperature: float) -> np.ndarray:
    return np.log(np.sum(np.exp(logits / temperature), axis=1))


@pytest.fixture(params=HEADS)
def case(request, monkeypatch):
    parts = HEADS[request.param]
    # Chunks of 14 rows, in which 37 end with one that is not full; tiles of 320 columns, the last of which has 40.
    monkeypatch.setattr(signal_head, "_CPU_TILE_BYTES", 14 * 4 * 320)
    head = SignalHead(Unembedding(WEIGHT, **parts), device="cpu", chunk_bytes=14 * 4 * VOCABULARY)
    return head, reference_logits(**parts)


def test_logits(case):
    head, reference = case
    np.testing.assert_allclose(head.logits(STATES).numpy(), reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 64, VOCABULARY])
def test_topk(case, k):
    head, reference = case
    temperatures = [0.5, 1.0, 2.0, 5.0]
    signals = head.topk(STATES, TARGETS, k=k, temperatures=temperatures)
    order = np.argsort(-reference, axis=1, kind="stable")[:, :k]
    np.testing.assert_allclose(
        signals.logits_RK.numpy(), np.take_along_axis(reference, order, axis=1), rtol=1e-5, atol=1e-4
    )
    # Ids may differ from the reference's where logits are equal, so they are judged by their logits.
    at_ids = np.take_along_axis(reference, signals.ids_RK.numpy(), axis=1)
    np.testing.assert_allclose(signals.logits_RK.numpy(), at_ids, rtol=1e-5, atol=1e-4)
    assert all(len(set(row)) == k for row in signals.ids_RK.tolist())
    np.testing.assert_allclose(
        signals.target_logits_R.numpy(), reference[np.arange(ROWS), TARGETS], rtol=1e-5, atol=1e-4
    )
    for column, temperature in enumerate(temperatures):
        expected = reference_logsumexp(reference, temperature)
        np.testing.assert_allclose(signals.logsumexp_RM[:, column].numpy(), expected, rtol=1e-5)


def test_candidates_ragged_and_repeated(case):
    head, reference = case
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (ROWS, 7))
    for row in range(ROWS):
        ids[row, row % 8 :] = -1  # 0 to 7 candidates
    signals = head.candidates(STATES, TARGETS, candidate_ids_RC=torch.from_numpy(ids), temperatures=[2.0])
    expected = np.where(ids >= 0, np.take_along_axis(reference, ids.clip(0), axis=1), -np.inf)
    np.testing.assert_allclose(signals.logits_RK.numpy(), expected, rtol=1e-5, atol=1e-4)
    assert signals.ids_RK is None
    np.testing.assert_allclose(signals.logsumexp_RM[:, 0].numpy(), reference_logsumexp(reference, 2.0), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 6, ROWS])
def test_the_last_position_has_no_target_token(case, rows):
    head, reference = case
    signals = head.topk(STATES[:rows], TARGETS[: rows - 1], k=3, temperatures=[1.0])
    assert signals.logits_RK.shape == (rows, 3)
    expected = reference[np.arange(rows - 1), TARGETS[: rows - 1]]
    np.testing.assert_allclose(signals.target_logits_R.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_rows_do_not_depend_on_their_company(case):
    head, _ = case
    together = head.topk(STATES, TARGETS, k=5, temperatures=[1.0])
    alone = head.topk(STATES[11:12], TARGETS[11:12], k=5, temperatures=[1.0])
    torch.testing.assert_close(alone.logits_RK[0], together.logits_RK[11], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(alone.logsumexp_RM[0], together.logsumexp_RM[11], rtol=1e-6, atol=1e-6)


def test_a_mass_above_one_is_never_reported(case):
    head, _ = case
    signals = head.topk(STATES, TARGETS, k=VOCABULARY, temperatures=[1.0])
    mass = (signals.logits_RK.double() - signals.logsumexp_RM.double()).exp().sum(1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1500), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_largest_is_topk(columns, k, ties, seed):
    k = min(k, columns)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, columns, generator=generator)
    if ties:
        logits = logits.round()
    values, ids = largest(logits, group_maxima(logits), k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(values, logits.gather(1, ids))
    assert all(len(set(row)) == k for row in ids.tolist())
