"""A student made of a teacher by layer pruning: some of its layers, all of its vocabulary.

Unless it is said which, the first and the last layer are kept, and the others are spread evenly (as DistilBERT and its
successors initialise their students; Sanh et al. 2019, arXiv 1910.01108, section 3). `block_influence` says which ones
change their input least, and so are missed least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def kept_layers(total: int, keep: int) -> list[int]:
    """Indices of the kept layers, rising: evenly spread from the first to the last.

    Raises:
        ConfigurationError: `keep` is not in 2 … total.

    """
    if not 2 <= keep <= total:
        raise ConfigurationError(f"cannot keep {keep} of {total} layers; choose 2 to {total}", "layers")
    return [round(index * (total - 1) / (keep - 1)) for index in range(keep)]


def block_influence(model: PreTrainedModel, sequences: Sequence[Tensor]) -> list[float]:
    """How much each layer changes what goes through it: 1 - cosine of its input and output, mean over all tokens.

    "Block influence" of Men et al. 2024, arXiv 2403.03853, equation 1.

    Args:
        model: a causal language model whose layers are `model.layers`.
        sequences: token ids, each of shape (tokens,).

    Returns:
        A number from 0 to 2 for each layer.

    """
    import torch
    from torch.nn.functional import cosine_similarity

    layers = model.model.layers
    influence = torch.zeros(len(layers), dtype=torch.float64)

    def hook(index: int) -> Callable[..., None]:
        def add(_: object, given: tuple[Tensor, ...], made: Tensor) -> None:
            influence[index] += (1 - cosine_similarity(given[0].double(), made.double(), dim=-1)).sum()

        return add

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        with torch.inference_mode():
            for ids in sequences:
                model(ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (influence / sum(len(ids) for ids in sequences)).tolist()


def prune_layers(teacher: Path, student: Path, *, layers: int | Sequence[int]) -> None:
    """Writes a checkpoint with some of the teacher's layers, its embeddings, head and tokenizer.

    Args:
        teacher: Hugging Face directory of a causal language model whose layers are `model.layers`.
        student: directory to write.
        layers: how many layers to keep, evenly spread, or which, rising from 0.

    Raises:
        ConfigurationError: the teacher has not that many layers, or keeps them elsewhere.

    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="auto")
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if blocks is None:
        raise ConfigurationError(f"{type(model).__name__} has no model.layers to keep some of", "teacher")
    keep = kept_layers(len(blocks), layers) if isinstance(layers, int) else list(layers)
    model.model.layers = torch.nn.ModuleList(blocks[index] for index in keep)
    for index, block in enumerate(model.model.layers):
        # The key-value cache is a list of layers that is indexed with it.
        block.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(keep)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in keep]
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(student)
