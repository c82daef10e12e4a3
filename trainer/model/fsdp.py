"""A student whose weights, gradients and optimizer state are shared out over its workers, with torch's FSDP2.

Each worker keeps its part of every trained weight in float32, which the optimizer steps, and its part of every frozen
one as it is. Forward and backward bring a layer's weights together in `dtype` when it is its turn, and give each worker
the float32 sum of its part of the gradients. A model that `shard` has not seen, and its tensors, are left as they are.

Bringing weights together takes all workers: they call the same of these functions, and of the model's passes, in the
same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: Any, *, dtype: torch.dtype, device: torch.device, forward: str) -> None:
    """Leaves this worker its part of each of the model's weights, on its device; changes the model in place.

    Args:
        model: a transformers causal language model, on the CPU, the same with every worker.
        dtype: of forward and backward.
        device: where this worker computes.
        forward: name of the method that is the forward pass in training. After it the weights that belong to no layer,
            the head's among them, are unsharded until the end of the backward pass.

    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    # Weights are shared out by layer, in transformers' unit of recomputation, so that one layer at a time is unsharded.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # FSDP2 keeps the shards in the dtype that they have (float32 where trained) and casts for the passes; sums of
    # gradients in bfloat16 would lose what small ones add.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in [*layers, model]:
        _to_float32(module)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        # FSDP2 would divide by the number of workers. Sums, as between workers with the full student; gloo knows no
        # others.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # An expert that no token of a worker's share was sent to has no gradient there.
    model.set_reduce_scatter_unused_params(True)
    register_fsdp_forward_method(model, forward)


def _to_float32(module: nn.Module) -> None:
    """Of what is trained and not yet shared out. Layer by layer: the full model in float32 may not fit."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


@contextmanager
def unsharded(model: Any) -> Iterator[None]:
    """All weights are here, in the forward pass's dtype, so that passes without gradients concern no other worker."""
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # Without gradients FSDP2 would drop a layer's weights after each forward pass, and gather them again with a
    # collective that the other workers, who generate other numbers of tokens, do not join.
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()
            group.set_reshard_after_forward(group is not model, recurse=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor that each worker has a part of, on the CPU; another tensor as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this worker keeps of a full tensor that all workers have, dealt out as `like` is; all of it if that is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
