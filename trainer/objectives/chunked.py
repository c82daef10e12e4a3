"""Functions of each row's logits, for a vocabulary too large to hold all rows' logits at once.

The two matrix products run on chunks of rows, everything between them on blocks of a few rows that stay in the
processor's cache. The gradient at a block's logits overwrites the chunk's product, so beyond one chunk neither
logits nor their gradients exist. A frozen unembedding (LoRA) needs no second look at the logits: the gradient at the
hidden states is ready after the forward pass. A trained one recomputes the logits in the backward pass, when the
weight of every row in the loss is known.

Legend: N rows, n rows of a chunk or block, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.signals import Unembedding

# 16 rows of 49,152 float32 logits are 3 MiB; with 64 rows the passes over them took twice as long.
_BLOCK_ROWS = 16


class BlockFunction(Protocol):
    """One value per row of a block, and its derivative."""

    def __call__(self, logits_nV: Tensor, block: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Values [n] (or [n, M] if no gradient is wanted) and, if wanted, their gradients [n, V] at the logits.

        The logits may be overwritten. `block` says which rows of the chunk these are.
        """


class RowFunction(Protocol):
    """A function of rows of student logits and of something about the same rows that it holds."""

    def of_chunk(self, rows: slice) -> BlockFunction:
        """The function for the blocks of a chunk; what takes a large product is prepared here."""


def evaluate_rows(hidden_ND: Tensor, head: Unembedding, function: RowFunction, *, chunk_rows: int) -> Tensor:
    """The function's values for each row, [N] or [N, M], with gradients to hidden states, matrix and bias."""
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
        return (slice(start, min(start + self.chunk_rows, rows)) for start in range(0, rows, self.chunk_rows))


class _EvaluateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, matrix_VD: Tensor, bias_V: Tensor | None, plan: _Plan) -> Tensor:
        ctx.plan = plan
        ctx.head_is_trained = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        with_gradient = plan.grad_enabled and ctx.needs_input_grad[0] and not ctx.head_is_trained
        values, gradients = [], []
        for rows in plan.chunks(len(hidden_ND)):
            product_nV = plan.head.product(hidden_ND[rows])
            values.append(_fill_with_gradient(plan, product_nV, rows, with_gradient))
            if with_gradient:
                gradients.append((product_nV @ matrix_VD).to(hidden_ND.dtype))
        saved_ND = torch.cat(gradients) if with_gradient else hidden_ND
        ctx.save_for_backward(saved_ND, matrix_VD, bias_V)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        saved_ND, matrix_VD, bias_V = ctx.saved_tensors
        if not ctx.head_is_trained:
            return saved_ND * upstream_N[:, None].to(saved_ND.dtype), None, None, None
        gradient_hidden_ND = torch.empty_like(saved_ND)
        gradient_matrix_VD: Tensor | None = None
        gradient_bias_V: Tensor | None = None
        for rows in ctx.plan.chunks(len(saved_ND)):
            product_nV = ctx.plan.head.product(saved_ND[rows])
            _fill_with_gradient(ctx.plan, product_nV, rows, True, upstream_N[rows])
            gradient_hidden_ND[rows] = product_nV @ matrix_VD
            gradient_matrix_VD = _add(gradient_matrix_VD, product_nV.T @ saved_ND[rows].to(matrix_VD.dtype))
            if bias_V is not None:
                gradient_bias_V = _add(gradient_bias_V, product_nV.sum(0))
        return (
            gradient_hidden_ND,
            None if gradient_matrix_VD is None else gradient_matrix_VD.to(matrix_VD.dtype),
            None if gradient_bias_V is None or bias_V is None else gradient_bias_V.to(bias_V.dtype),
            None,
        )


def _fill_with_gradient(
    plan: _Plan, product_nV: Tensor, rows: slice, with_gradient: bool, upstream_n: Tensor | None = None
) -> Tensor:
    """Values of a chunk; its product is overwritten with the (weighted) gradient at the product if wanted."""
    function = plan.function.of_chunk(rows)
    values = []
    for start in range(0, len(product_nV), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        logits_nV = plan.head.finish(product_nV[block])
        before_nV = logits_nV.clone() if plan.head.softcap > 0.0 else logits_nV
        value_n, gradient_nV = function(logits_nV, block, with_gradient)
        values.append(value_n)
        if gradient_nV is not None:
            if upstream_n is not None:
                gradient_nV = gradient_nV.mul_(upstream_n[block, None])
            product_nV[block] = plan.head.finish_backward(gradient_nV, before_nV)
    return torch.cat(values)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    """Sums of several chunks are kept in float32: bfloat16 would round at each."""
    return part if total is None else total.to(torch.promote_types(part.dtype, torch.float32)).add_(part)
