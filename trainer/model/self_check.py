"""Does a student's loss see what its model computes? Found out with the model's own code before the first step.

What a model does between its final hidden states and its logits, and what it adds to its own loss, stands in its code
and not in its files; a softcap, a scale or a term that is left out trains another model, silently. So no list of models
says which are right: the model's own logits and loss of a short text do, and its own logits of states that it is given.

Shapes: the legend in docs/architecture.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tutelage.errors import ConfigurationError
from tutelage.trainer.data.sequences import TokenSequence

# A short text and a longer one beside it, so that the padding of a batch takes part in what is compared.
_TEXT_TOKENS = (24, 40)
_STATE_ROWS = 16
# Zero states leave the bias, small ones the matrix and the scale, large ones the softcap; powers of two are exact.
_SMALL, _LARGE = 1.0, 1024.0
# The model's own loss and the cross-entropy of its own logits are sums of the same float32 numbers.
_LOSS_TOLERANCE = 1e-4
# Logits of a text may differ by so much of their spread, on average; bfloat16 products are known to 1/256, and layers
# add to it: a model of 30 came to 1/40. What is left out (a cap, a scale, a window) moves them by far more.
TEXT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1 / 8}
# Logits of given states, of the largest one.
_STATE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1 / 32}


@dataclass(frozen=True)
class OwnOutputs:
    """What a model's own code makes of the probes, before anything of it was changed."""

    text_logits: tuple[Tensor, ...]
    """float32 [T, V] of each text, computed alone."""
    states_RD: Tensor
    """Hidden states of several sizes."""
    state_logits_RV: Tensor
    """float32: its logits of those states."""


def body_of(model: Any) -> Any:
    """The part of a transformers causal language model whose output is what its head turns into logits."""
    # `base_model` of a class that names an attribute which it does not have (Llama 4's text model) is the model itself.
    return model.base_model if model.base_model is not model else model.model


def largest_probed_id(model: Any, vocabulary_size: int) -> int:
    """The largest id of a probe: of the tokenizer, and in the model, which may have fewer where ids were added."""
    return min(vocabulary_size, len(model.get_input_embeddings().weight)) - 1


def texts_of(model: Any, vocabulary_size: int) -> list[TokenSequence]:
    """Probes: ids from all over the vocabulary, every position scored; no longer than the model's positions."""
    largest = largest_probed_id(model, vocabulary_size)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(_TEXT_TOKENS)
    lengths = [min(length, largest + 1, positions) for length in _TEXT_TOKENS]
    ids = [np.linspace(0, largest, length).astype(np.int32) for length in lengths]
    return [TokenSequence(each, 0, len(each)) for each in ids]


def own_outputs(model: Any, vocabulary_size: int, *, router_loss: bool = False) -> OwnOutputs:
    """What the model's own code makes of the probes; refuses one whose loss is not that of its tokens alone.

    Args:
        model: a transformers causal language model, as it was loaded.
        vocabulary_size: ids that the tokenizer can produce.
        router_loss: whether the student adds the load-balancing loss itself, so that the model may, too.

    Raises:
        ConfigurationError: the model adds a term to its own loss.

    """
    texts = [torch.from_numpy(text.ids).long().to(model.device)[None] for text in texts_of(model, vocabulary_size)]
    _check_loss(model, texts[-1], router_loss)
    model.eval()
    with torch.no_grad():
        logits = tuple(model(input_ids=ids_1T, use_cache=False).logits[0, :, :vocabulary_size] for ids_1T in texts)
        width = model.get_output_embeddings().weight.shape[1]
        states_RD = torch.randn(_STATE_ROWS, width, generator=torch.Generator().manual_seed(0)).to(model.dtype)
        # The first row is zero, the second half is large.
        sizes_R1 = torch.tensor([0.0] + [_SMALL] * (_STATE_ROWS // 2 - 1) + [_LARGE] * (_STATE_ROWS // 2))[:, None]
        states_RD = (states_RD * sizes_R1.to(model.dtype)).to(model.device)
        state_logits_RV = _logits_of_states(model, states_RD)[:, :vocabulary_size]
    model.train()
    return OwnOutputs(tuple(each.float().cpu() for each in logits), states_RD.cpu(), state_logits_RV.float().cpu())


def _check_loss(model: Any, ids_1T: Tensor, router_loss: bool) -> None:
    """Compares the model's own loss with the cross-entropy of the logits that the same pass gives."""
    routed = {"output_router_logits": False} if router_loss else {}
    # As it is trained: a model may add a term in training only, and dropout moves both sides of the comparison.
    model.train()
    with torch.no_grad():
        output = model(input_ids=ids_1T, labels=ids_1T, use_cache=False, **routed)
    if output.loss is None:
        return
    tokens = cross_entropy(output.logits[0, :-1].float(), ids_1T[0, 1:])
    difference = float(output.loss) - float(tokens)
    if abs(difference) > _LOSS_TOLERANCE * max(1.0, abs(float(tokens))):
        config = model.config.get_text_config()
        found = [f"{name} {value}" for name, value in vars(config).items() if name.endswith("_loss_coef") and value]
        raise ConfigurationError(
            f"{type(model).__name__} adds {difference:+.4f} to the loss of its tokens "
            f"({', '.join(found) or 'its configuration does not say why'}), which no objective here has; add "
            "a router's by router_loss_weight, set output_router_logits to false in its config.json to train it "
            "without, or choose another model",
            "init",
        )


def require_router_loss(model: Any) -> None:
    """Refuses a model whose code in transformers has no load-balancing loss.

    Raises:
        ConfigurationError: so it is.

    """
    module = sys.modules[type(model).__module__]
    named = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    if not (named and hasattr(module, "load_balancing_loss_func")):
        raise ConfigurationError(
            f"{type(model).__name__} has no load-balancing loss in transformers; leave it out", "router_loss_weight"
        )


def router_loss_of(model: Any, router_logits: tuple[Tensor, ...], mask_BT: Tensor) -> Tensor:
    """The load-balancing loss of the model's own code over the tokens of a mask, a scalar."""
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    loss: Tensor = function(router_logits, model.num_experts, model.num_experts_per_tok, mask_BT)
    return loss


def _logits_of_states(model: Any, states_RD: Tensor) -> Tensor:
    """What the model makes of final hidden states that are given to it, [R, V]."""

    # transformers has no way to give a causal model its last hidden state; a hook on the body under its head does.
    def replace_states(_module: Any, _arguments: Any, output: Any) -> None:
        output.last_hidden_state = states_RD[None]

    # OPT's head asks the decoder within its body and not the body.
    bodies = {body_of(model), model.get_decoder()} - {model}
    hooks = [body.register_forward_hook(replace_states) for body in bodies]
    try:
        ids_1R = torch.zeros(1, len(states_RD), dtype=torch.int64, device=states_RD.device)
        logits_RV: Tensor = model(input_ids=ids_1R, use_cache=False).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return logits_RV


def require_same_logits(
    own: OwnOutputs, ours_of_texts: Sequence[Tensor], ours_of_states_RV: Tensor, dtype: torch.dtype, model_name: str
) -> None:
    """Refuses a student whose loss would see other logits than its model's own.

    Args:
        own: the model's.
        ours_of_texts: float32 [T, V] for each text of `texts_of`, as the loss sees them.
        ours_of_states_RV: float32, of `own.states_RD`.
        dtype: of the student's forward pass.
        model_name: for the message.

    Raises:
        ConfigurationError: they differ by more than rounding in `dtype` can explain; says where.

    """
    halves = {
        "a state of zeros (a bias)": slice(0, 1),
        "small states (a scale)": slice(1, _STATE_ROWS // 2),
        "large states (a softcap)": slice(_STATE_ROWS // 2, None),
    }
    problems = []
    for what, rows in halves.items():
        theirs_RV, ours_RV = own.state_logits_RV[rows], ours_of_states_RV[rows]
        found = float((ours_RV - theirs_RV).abs().max() / theirs_RV.abs().max().clamp(min=1e-6))
        if found > _STATE_TOLERANCE[dtype]:
            problems.append(f"of {what} by {found:.2g} of their size (allowed {_STATE_TOLERANCE[dtype]:.2g})")
    for theirs_TV, ours_TV in zip(own.text_logits, ours_of_texts, strict=True):
        found = float((ours_TV - theirs_TV).abs().mean() / theirs_TV.std().clamp(min=1e-6))
        if found > TEXT_TOLERANCE[dtype]:
            of_text = f"of a text of {len(theirs_TV)} tokens"
            problems.append(f"{of_text} by {found:.2g} of their spread (allowed {TEXT_TOLERANCE[dtype]:.2g})")
    if problems:
        raise ConfigurationError(
            f"the logits that the loss would see differ from {model_name}'s own: {'; '.join(problems)}. Its code does "
            "something that is not known here; choose another model, or report which one this is",
            "init",
        )


def require_gradients(model: Any, hidden_and_head: Callable[[Tensor], Sequence[Tensor]], vocabulary_size: int) -> None:
    """Refuses a model with trained weights that no gradient of the loss reaches.

    Args:
        model: with what is trained marked by `requires_grad`.
        hidden_and_head: from token ids [B, T] to the tensors that the loss is a function of.
        vocabulary_size: ids that the tokenizer can produce.

    Raises:
        ConfigurationError: names such weights. An expert that the text was not sent to is none of them.

    """
    ids_BT = torch.from_numpy(texts_of(model, vocabulary_size)[-1].ids).long().to(model.device)[None]
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in model.modules()]
    model.eval()
    try:
        reached = set(_leaves(hidden_and_head(ids_BT)))
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in reached and not _sent_elsewhere(model, name, called)
    ]
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConfigurationError(
            f"no gradient of the loss reaches {named}: they would be counted as trained and never change; start from a "
            "checkpoint of the language model alone, or train adapters (lora) where the text passes",
            "init",
        )


def _leaves(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The tensors with a gradient that these were computed from; without a backward pass and its memory."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    yield from (tensor for tensor in tensors if tensor.requires_grad and tensor.grad_fn is None)
    seen = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad, the end of the graph at a leaf.
            yield node.variable
        pending += [each for each, _ in node.next_functions if each is not None]


def _sent_elsewhere(model: nn.Module, name: str, called: set[nn.Module]) -> bool:
    """Whether a weight is of one of several modules of a list, of which the text passed through others."""
    module, parts = model, name.split(".")[:-1]
    for part in parts:
        parent, module = module, module.get_submodule(part)
        if isinstance(parent, nn.ModuleList) and not _any_called(module, called):
            return any(_any_called(sibling, called) for sibling in parent)
    return False


def _any_called(module: nn.Module, called: set[nn.Module]) -> bool:
    return any(each in called for each in module.modules())
