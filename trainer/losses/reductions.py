"""From one value per token to the number that is minimised.

Sums over micro-batches and workers of these give the loss of the whole optimizer step: the divisor is always that of
the step, never of the micro-batch. N rows.
"""

from __future__ import annotations

from torch import Tensor


def reduce_token_mean(loss_N: Tensor, total_tokens: int) -> Tensor:
    """Σ loss / tokens of the step: every token counts the same.

    Args:
        loss_N: values of the rows of one micro-batch.
        total_tokens: rows of all micro-batches of the optimizer step on all workers, ≥ 1.

    """
    return loss_N.sum() / total_tokens


def reduce_sequence_mean(loss_N: Tensor, sequence_tokens_N: Tensor, total_sequences: int) -> Tensor:
    """Mean over each sequence's tokens, then over the sequences of the step: every sequence counts the same.

    Args:
        loss_N: values of the rows of one micro-batch.
        sequence_tokens_N: int64, for each row the number of rows of its sequence.
        total_sequences: sequences of the optimizer step on all workers, ≥ 1.

    """
    return (loss_N / sequence_tokens_N).sum() / total_sequences


def reduce_micro_batch_token_mean(loss_N: Tensor, micro_batches: int) -> Tensor:
    """Mean over the micro-batch's tokens, then over micro-batches: tokens of short micro-batches count more.

    Args:
        loss_N: values of the rows of one micro-batch, N ≥ 1.
        micro_batches: micro-batches of the optimizer step on all workers, ≥ 1.

    """
    return loss_N.mean() / micro_batches
