"""What a model can be asked for in our faster ways: contexts shared in one packed row, and decoding with a cache.

A packed row says by a mask and by position ids what sees what; so does a shared beginning, after which stands the
padding. Whatever decides that otherwise (a sliding window or a chunk counted in places of the row, a recurrent state,
a bias made from distances in the row) gives other numbers, silently. So sharing is for models of which it is known to
be right: by the layers of their own cache, and by a probe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tutelage.errors import ConfigurationError
from tutelage.evaluator.models.base import ScoringGroup

Loglikelihood = Callable[[Sequence[ScoringGroup]], list[list[float]]]


def reason_not_to_share(model: Any, packed: Loglikelihood, plain: Loglikelihood, *, tokens: int) -> str:
    """What rules sharing out in rows of so many tokens, in words; empty if nothing does.

    Besides what the model says of itself, a packed row of random tokens is compared with plain forward passes. That
    sees what no cache class says: a window that the attention itself applies (GPT-Neo), position ids that are ignored.
    What lies beyond `tokens` it cannot see.

    Args:
        model: a causal language model.
        packed: log-likelihoods as they are to be computed.
        plain: by a forward pass of each continuation.
        tokens: of the row, about.

    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position ids"
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if layers != {DynamicLayer}:
        others = sorted(layer.__name__ for layer in layers - {DynamicLayer})
        return f"its cache has layers of the kinds {', '.join(others)}, which do not keep all tokens"
    try:
        gap = _gap(packed, plain, tokens, int(model.config.get_text_config(decoder=True).vocab_size))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return f"it does not take a mask of places ({error})"
    right = gap <= _tolerance(torch.finfo(model.dtype).eps)
    return "" if right else f"a packed row of {tokens} tokens is {gap:.2g} nats a token off plain forward passes"


def _gap(packed: Loglikelihood, plain: Loglikelihood, tokens: int, vocabulary_size: int) -> float:
    """The largest difference, in nats a token, in a row of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary_size, (count,), generator=generator).tolist())

    # A short group first, so that the positions of the second differ from its places in the row.
    ahead, branch = max(2, tokens // 8), max(2, tokens // 16)
    context = max(2, tokens - ahead - 4 * branch)
    groups = [
        ScoringGroup(ids(ahead - 1), (ids(2), ids(2))),
        ScoringGroup(ids(context), (ids(branch), ids(branch), ids(branch))),
    ]
    gaps = [
        abs(one - other) / len(continuation)
        for group, ones, others in zip(groups, packed(groups), plain(groups), strict=True)
        for continuation, one, other in zip(group.continuations, ones, others, strict=True)
    ]
    return max(gaps)


def check_decoding(model: Any, decode: Callable[[list[list[int]]], list[list[int]]]) -> None:
    """Decodes a few tokens greedily and compares each with a plain forward pass.

    Args:
        model: a causal language model.
        decode: some greedy tokens after each prompt.

    Raises:
        ConfigurationError: the model keeps its state elsewhere than in transformers' caches, or reads them otherwise.

    """
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ConfigurationError(f"{name} does not take a cache of transformers; use the engine vllm", "engine")
    prompts = [[3, 4, 5, 6, 7, 8], [5, 4, 3]]
    try:
        answers = decode(prompts)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{name} cannot be decoded with a cache of transformers ({error}); use the engine vllm", "engine"
        ) from error
    for prompt, answer in zip(prompts, answers, strict=True):
        ids_1T = torch.tensor([prompt + answer], device=model.device)
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen_T1 = torch.tensor(answer, device=model.device)[:, None]
        gap = float((logits_TV.max(dim=-1).values - logits_TV.gather(1, chosen_T1)[:, 0]).max())
        if gap > _tolerance(torch.finfo(model.dtype).eps, float(logits_TV.abs().max())):
            raise ConfigurationError(
                f"{name} does not decode what its plain forward pass prefers ({gap:.3g} nats less likely); use the "
                "engine vllm",
                "engine",
            )


def _tolerance(eps: float, largest_logit: float = 0.0) -> float:
    """Nats a token that rounding explains.

    It moves a logit by a few units in its last place, and logits are some tens at most unless it is known better:
    about 1e-5 in float32 (the largest gap to another implementation was 1e-4 for a whole choice, docs/evaluation.md),
    and 0.3 in bfloat16, where only what is grossly wrong is seen.
    """
    return max(1e-4, 40 * eps, 4 * eps * largest_logit)
