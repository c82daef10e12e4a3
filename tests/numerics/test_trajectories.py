"""Twenty steps of Adam with each objective follow the losses in trajectories.json (float32, tolerance 1e-5).

A change of these numbers is a change of what students learn. A new objective's are added by running this file as a
program (`PYTHONPATH=proto:tests python tests/numerics/test_trajectories.py`), which leaves those that are there; to
have one written again, take it out first, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from numerics.cases import make_case
from tutelage.trainer.losses.losses import token_cross_entropy, token_divergence, token_policy_gradient
from tutelage.trainer.losses.reductions import reduce_token_mean
from tutelage.trainer.losses.registry import OBJECTIVES
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import Unembedding

FILE = Path(__file__).with_name("trajectories.json")
STEPS, ROWS, VOCABULARY = 20, 24, 64
RUNS = [(name, kind) for name, row in OBJECTIVES.items() for kind in row.exact or ("none",)]
RUNS = [run for run in RUNS if run != ("policy_gradient_kl", "topk") and run != ("policy_gradient_kl", "candidates")]


def losses_of(name: str, kind: str) -> list[float]:
    case = make_case(ROWS, VOCABULARY, 8, dtype=torch.float32)
    hidden, matrix = case.hidden_ND.requires_grad_(), case.head.matrix_VD.requires_grad_()
    head = Unembedding(matrix)
    optimizer = torch.optim.Adam([hidden, matrix], lr=0.03)
    tokens = torch.arange(ROWS) * 5 % VOCABULARY
    distribution = TeacherDistribution(
        temperature=1.5, noise=0.5 if kind == "hidden" else 0.0, scale_by_temperature_squared=True
    )
    teacher = case.rows(kind, k=8, temperature=1.5) if kind != "none" else None
    losses = []
    for _ in range(STEPS):
        if teacher is None:
            value = token_cross_entropy(hidden, head, tokens, chunk_rows=10)
        elif OBJECTIVES[name].sampled_token:
            value, _ = token_policy_gradient(hidden, head, teacher, tokens, distribution=distribution, chunk_rows=10)
        else:
            value = token_divergence(hidden, head, teacher, objective=name, distribution=distribution, chunk_rows=10)
        loss = reduce_token_mean(value, ROWS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "kind"), RUNS)
@pytest.mark.usefixtures("deterministic")
def test_losses_follow_the_committed_trajectory(name, kind):
    losses = losses_of(name, kind)
    assert losses == losses_of(name, kind)
    assert losses == pytest.approx(json.loads(FILE.read_text())[f"{name} on {kind}"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, _ in RUNS if not OBJECTIVES[name].sampled_token])
def test_losses_fall(name):
    trajectories = json.loads(FILE.read_text())
    for key, losses in trajectories.items():
        if key.startswith(f"{name} on "):
            assert losses[-1] < 0.8 * losses[0]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    trajectories = json.loads(FILE.read_text())
    for name, kind in RUNS:
        if f"{name} on {kind}" not in trajectories:
            trajectories[f"{name} on {kind}"] = [round(loss, 7) for loss in losses_of(name, kind)]
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(losses)}" for key, losses in trajectories.items())
    FILE.write_text("{\n" + lines + "\n}\n")
