"""The chunked, recomputing form equals the plain one, in value, gradient and under every split, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from numerics.cases import DIVERGENCES, Case, make_case, plain_divergence, plain_logits
from tutelage.trainer.losses.chunked import BLOCK_ROWS
from tutelage.trainer.losses.losses import token_cross_entropy, token_divergence
from tutelage.trainer.losses.registry import OBJECTIVES
from tutelage.trainer.losses.teacher_distribution import TeacherDistribution
from tutelage.trainer.teacher.rows import HiddenRows, Unembedding

SERVED = [(name, kind) for name in DIVERGENCES for kind in OBJECTIVES[name].exact]
DISTRIBUTIONS = [
    TeacherDistribution(),
    TeacherDistribution(temperature=2.0, scale_by_temperature_squared=True),
    TeacherDistribution(temperature=2.0, student_temperature=0.7),
]


def leaves(case, trained=True):
    matrix = case.head.matrix_VD.clone().requires_grad_(trained)
    return case.hidden_ND.clone().requires_grad_(), Unembedding(matrix, case.head.bias_V)


def gradients(value_N, hidden, head, weights):
    inputs = [hidden, head.matrix_VD] if head.matrix_VD.requires_grad else [hidden]
    return torch.autograd.grad((value_N * weights).sum(), inputs)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=["T1", "T2 squared", "two temperatures"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("objective", "kind"), SERVED)
def test_chunked_equals_plain_in_value_and_gradient(objective, kind, trained, distribution):
    case = make_case(rows=37)
    teacher = case.rows(kind, temperature=distribution.temperature)
    weights = torch.linspace(-1.0, 2.0, 37, dtype=torch.float64)
    hidden, head = leaves(case, trained)
    value = token_divergence(hidden, head, teacher, objective=objective, distribution=distribution, chunk_rows=20)
    plain = plain_divergence(hidden, head, teacher, objective=objective, distribution=distribution)
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(("objective", "kind"), SERVED)
def test_chunked_equals_plain_to_1e6_in_float32(objective, kind):
    case = make_case(rows=64, vocabulary=300, width=16, dtype=torch.float32)
    hidden, head = leaves(case)
    teacher = case.rows(kind)
    value = token_divergence(
        hidden, head, teacher, objective=objective, distribution=TeacherDistribution(), chunk_rows=20
    )
    plain = plain_divergence(hidden, head, teacher, objective=objective, distribution=TeacherDistribution())
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=2e-6)
    weights = torch.full((64,), 1.0 / 64)
    torch.testing.assert_close(
        gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("trained", [True, False])
def test_cross_entropy_equals_torchs(trained):
    case = make_case(rows=37)
    hidden, head = leaves(case, trained)
    targets = torch.arange(37) % 23
    weights = torch.linspace(-1.0, 2.0, 37, dtype=torch.float64)
    value = token_cross_entropy(hidden, head, targets, chunk_rows=20)
    plain = torch.nn.functional.cross_entropy(plain_logits(hidden, head), targets, reduction="none")
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights))


@pytest.mark.parametrize("objective", ["reverse_kl", "skew_kl"])
def test_bias_scale_and_softcap_of_both_heads(objective):
    case = make_case(rows=37)
    bias = torch.linspace(-1.0, 1.0, 23, dtype=torch.float64).requires_grad_()
    matrix = case.head.matrix_VD.clone().requires_grad_()
    head = Unembedding(matrix, bias, scale=0.8, softcap=3.0)
    hidden = case.hidden_ND.clone().requires_grad_()
    capped = Unembedding(case.teacher.unembedding.matrix_VD, bias.detach().flip(0), scale=1.3, softcap=4.0)
    teacher = HiddenRows(case.teacher.hidden_ND, case.teacher.sequence_digest_N, case.teacher.position_N, capped)
    torch.testing.assert_close(
        capped.logits(teacher.hidden_ND), plain_logits(teacher.hidden_ND, capped), rtol=1e-12, atol=1e-12
    )
    arguments = {"objective": objective, "distribution": TeacherDistribution(temperature=1.5)}
    value = token_divergence(hidden, head, teacher, **arguments, chunk_rows=20)
    plain = plain_divergence(hidden, head, teacher, **arguments)
    torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-12)
    inputs = [hidden, matrix, bias]
    torch.testing.assert_close(
        torch.autograd.grad(value.square().sum(), inputs), torch.autograd.grad(plain.square().sum(), inputs)
    )


@pytest.mark.parametrize("upstream", ["one number", "one per row"])
def test_the_head_learns_the_same_whatever_the_weights_of_the_rows(upstream):
    case = make_case(rows=50)
    weights = torch.full((50,), 0.02) if upstream == "one number" else torch.linspace(0.1, 2.0, 50)
    hidden, head = leaves(case)
    value = token_divergence(
        hidden, head, case.teacher, objective="gkd", distribution=TeacherDistribution(), chunk_rows=20
    )
    plain = plain_divergence(hidden, head, case.teacher, objective="gkd", distribution=TeacherDistribution())
    torch.testing.assert_close(gradients(value, hidden, head, weights), gradients(plain, hidden, head, weights))


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any result, and the most bytes of results alive at once."""

    def __init__(self):
        super().__init__()
        self.elements = self.peak_bytes = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.elements = max(self.elements, storage.nbytes() // tensor.element_size())
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("objective", "kind"), [("reverse_kl", "hidden"), ("skew_kl", "hidden"), ("gkd", "topk")])
def test_memory_is_that_of_a_chunk(objective, kind, trained):
    """No tensor of more than a chunk of logits, and at most two such (student's and teacher's product) and blocks."""
    rows, chunk_rows, vocabulary, width = 256, 32, 4096, 8
    case = make_case(rows, vocabulary, width, dtype=torch.float32)
    teacher = case.rows(kind)
    hidden, head = leaves(case, trained)

    def run(function, **chunking):
        with LargestTensor() as largest:
            value = function(hidden, head, teacher, objective=objective, distribution=TeacherDistribution(), **chunking)
            torch.autograd.grad(value.mean(), [hidden, head.matrix_VD] if trained else [hidden])
        return largest

    found = run(token_divergence, chunk_rows=chunk_rows)
    chunk, of_block = chunk_rows * vocabulary, BLOCK_ROWS * vocabulary
    assert found.elements == max(chunk, width * vocabulary)
    heads_gradient = 3 * width * vocabulary * 4
    assert found.peak_bytes < (2 * chunk + 16 * of_block) * 4 + heads_gradient
    plain = run(plain_divergence)
    assert plain.elements == rows * vocabulary
    assert found.peak_bytes < plain.peak_bytes / 2


def test_no_rows_beside_the_chosen_ones_enter_the_block_of_a_row():
    """A row's value and gradient are the same alone, in another order and in other chunks."""
    case = make_case(rows=37)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    everything = token_divergence(
        case.hidden_ND,
        case.head,
        case.teacher,
        objective="gkd",
        distribution=TeacherDistribution(noise=1.0),
        chunk_rows=37,
    )
    for rows in (order, slice(5, 6), torch.arange(37) % 3 == 0):
        hidden = case.hidden_ND[rows]
        some = token_divergence(
            hidden,
            case.head,
            case.teacher.at(rows),
            objective="gkd",
            distribution=TeacherDistribution(noise=1.0),
            chunk_rows=2,
        )
        torch.testing.assert_close(some, everything[rows], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("objective", "kind"), [("reverse_kl", "hidden"), ("gkd", "hidden"), ("gkd", "topk")])
def test_bfloat16_weights_cost_only_bfloat16s_rounding(objective, kind, trained):
    """Against float64 from the same weights; the sum over chunks is kept in float32."""
    case = make_case(rows=200, vocabulary=500, width=32, dtype=torch.float64)
    scale = 0.3  # Logits with a standard deviation of about 2.
    rounded = [(scale * x).bfloat16() for x in (case.head.matrix_VD, case.teacher.unembedding.matrix_VD)]
    hidden_ND, teacher_ND = case.hidden_ND.bfloat16(), case.teacher.hidden_ND.bfloat16()

    def run(dtype, chunk_rows):
        digest, position = case.teacher.sequence_digest_N, case.teacher.position_N
        teacher = HiddenRows(teacher_ND.to(dtype), digest, position, Unembedding(rounded[1].to(dtype)))
        this = Case(
            hidden_ND.to(dtype).requires_grad_(), Unembedding(rounded[0].to(dtype).requires_grad_(trained)), teacher
        )
        value = token_divergence(
            this.hidden_ND,
            this.head,
            this.rows(kind),
            objective=objective,
            distribution=TeacherDistribution(),
            chunk_rows=chunk_rows,
        )
        return value, *gradients(value, this.hidden_ND, this.head, torch.full((200,), 1 / 200))

    value, *found = run(torch.bfloat16, chunk_rows=30)
    exact, *expected = run(torch.float64, chunk_rows=200)
    assert value.dtype == torch.float32
    assert value.mean().item() == pytest.approx(exact.mean().item(), rel=5e-3)
    for gradient, reference in zip(found, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.cosine_similarity(gradient.double().flatten(), reference.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(("objective", "kind"), [*SERVED, ("cross entropy", "none")])
def test_no_rows_give_no_values_and_zero_gradients(objective, kind):
    """A worker whose share of the batch was masked away still takes part in the step."""
    case = make_case()
    hidden, head = leaves(case)
    nothing = slice(0, 0)
    if kind == "none":
        value = token_cross_entropy(hidden[nothing], head, torch.arange(7)[nothing])
    else:
        teacher = case.rows(kind).at(nothing)
        value = token_divergence(
            hidden[nothing], head, teacher, objective=objective, distribution=TeacherDistribution(noise=0.0)
        )
    assert value.shape == (0,)
    for gradient in torch.autograd.grad(value.sum() / 7, [hidden, head.matrix_VD]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
