"""Functions of each row's logits, for a vocabulary too large to hold all rows' logits at once.

The two matrix products run on chunks of rows, everything between them on blocks of a few rows that stay in the
processor's cache. Beyond one chunk neither logits nor their gradients exist. The forward pass goes on to the gradients
at the hidden states and at the unembedding, as if every row weighed the same in the loss, so a mean over tokens never
sees the logits twice. If the backward pass finds other weights, it computes the logits again for the gradient at the
unembedding.

Shapes: the legend in docs/architecture.md; R rows of a chunk, and of a block within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutelage.trainer.teacher.rows import Unembedding, accurate_dtype

# 16 rows of 49,152 float32 logits are 3 MiB, which stay in a core's cache from one elementwise pass to the next; with
# 64 rows the passes over them took twice as long.
BLOCK_ROWS = 16


class BlockFunction(Protocol):
    """One value per row of a block, and its derivative."""

    def __call__(self, logits_RV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Values [R] (or [R, measures] if no gradient is wanted) and, if wanted, their gradients [R, V] at the logits.

        The logits may be overwritten. `block` says which rows of the chunk these are.
        """


class RowFunction(Protocol):
    """A function of rows of student logits and of something about the same rows that it holds."""

    def of_chunk(self, rows: slice) -> BlockFunction:
        """The function for the blocks of a chunk; what takes a large product is prepared here."""


def evaluate_rows(hidden_ND: Tensor, head: Unembedding, function: RowFunction, *, chunk_rows: int) -> Tensor:
    """The function's values for each row, [N] or [N, measures], with gradients to hidden states, matrix and bias."""
    plan = _Plan(head, function, chunk_rows, torch.is_grad_enabled())
    values_N: Tensor = _EvaluateRows.apply(hidden_ND, head.matrix_VD, head.bias_V, plan)
    return values_N


class _Plan:
    """What is no tensor among the inputs of the autograd function."""

    def __init__(self, head: Unembedding, function: RowFunction, chunk_rows: int, grad_enabled: bool) -> None:
        self.head = head
        self.function = function
        self.chunk_rows = chunk_rows
        self.grad_enabled = grad_enabled

    def chunks(self, rows: int) -> Iterator[slice]:
        return _pieces(rows, self.chunk_rows)


class _EvaluateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, matrix_VD: Tensor, bias_V: Tensor | None, plan: _Plan) -> Tensor:
        ctx.plan = plan
        # With LoRA the head is frozen: the product that gives its gradient, as large as the logits', is not computed.
        trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        with_gradient = plan.grad_enabled and (ctx.needs_input_grad[0] or trained)
        values, of_hidden = [], []
        of_head = _HeadGradient(ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        for rows in plan.chunks(len(hidden_ND)):
            value, gradient_RV = _values_and_gradient(plan, hidden_ND[rows], rows, with_gradient)
            values.append(value)
            if gradient_RV is not None:
                of_hidden.append((gradient_RV @ matrix_VD).to(hidden_ND.dtype))
                of_head.add(gradient_RV, hidden_ND[rows])
        if with_gradient:
            # What is kept is [N, D] and [V, D] however many rows there are; logits of all rows would be [N, V].
            kept = hidden_ND if trained else None
            ctx.save_for_backward(torch.cat(of_hidden), of_head.of_matrix_VD, of_head.of_bias_V, kept)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        of_hidden_ND, of_matrix_VD, of_bias_V, hidden_ND = ctx.saved_tensors
        # In float32: the weight of a row, rounded to bfloat16, would be a wrong learning rate.
        weighted_ND = (of_hidden_ND.to(upstream_N.dtype) * upstream_N[:, None]).to(of_hidden_ND.dtype)
        if hidden_ND is None:
            return weighted_ND, None, None, None
        # A mean over tokens weighs every row the same, so what the forward pass summed up needs one factor; a mean over
        # sequences does not, and pays for a second pass over the logits.
        if (upstream_N == upstream_N[:1]).all():
            weight = upstream_N[:1].sum().item()
            return weighted_ND, _times(of_matrix_VD, weight), _times(of_bias_V, weight), None
        of_head = _HeadGradient(ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        for rows in ctx.plan.chunks(len(hidden_ND)):
            _, gradient_RV = _values_and_gradient(ctx.plan, hidden_ND[rows], rows, True, upstream_N[rows])
            assert gradient_RV is not None
            of_head.add(gradient_RV, hidden_ND[rows])
        return weighted_ND, of_head.of_matrix_VD, of_head.of_bias_V, None


class _HeadGradient:
    """Sums the chunks' gradients at matrix and bias; of several chunks in float32, or bfloat16 would round at each."""

    def __init__(self, matrix: bool, bias: bool) -> None:
        self.matrix = matrix
        self.bias = bias
        self.of_matrix_VD: Tensor | None = None
        self.of_bias_V: Tensor | None = None

    def add(self, gradient_RV: Tensor, hidden_RD: Tensor) -> None:
        if self.matrix:
            self.of_matrix_VD = _sum(self.of_matrix_VD, gradient_RV.T @ hidden_RD.to(gradient_RV.dtype))
        if self.bias:
            self.of_bias_V = _sum(self.of_bias_V, gradient_RV.sum(0))


def _pieces(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices; of no rows one that is empty, so that a worker without rows still has (zero) gradients."""
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.to(accurate_dtype(part.dtype)).add_(part)


def _times(gradient: Tensor | None, weight: float) -> Tensor | None:
    return None if gradient is None else gradient * weight


def _values_and_gradient(
    plan: _Plan, hidden_RD: Tensor, rows: slice, with_gradient: bool, upstream_R: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Values of a chunk and, if wanted, the (weighted) gradient at its product, in the matrix's dtype."""
    product_RV = plan.head.product(hidden_RD)
    # In the product's place, unless that is wider: the products with the gradient take factors of the matrix's dtype.
    dtype = plan.head.matrix_VD.dtype
    gradients_RV = torch.empty_like(product_RV, dtype=dtype) if product_RV.dtype != dtype else product_RV
    function = plan.function.of_chunk(rows)
    values = []
    for block in _pieces(len(product_RV), BLOCK_ROWS):
        logits_RV = plan.head.finish(product_RV[block])
        # The function may overwrite the logits, and the derivative of tanh is taken from them.
        before_RV = logits_RV.clone() if plan.head.softcap > 0.0 else logits_RV
        value_R, gradient_RV = function(logits_RV, block, with_gradient)
        values.append(value_R)
        if gradient_RV is not None:
            if upstream_R is not None:
                gradient_RV = gradient_RV.mul_(upstream_R[block, None])
            gradients_RV[block] = plan.head.finish_backward(gradient_RV, before_RV)
    return torch.cat(values), gradients_RV if with_gradient else None
