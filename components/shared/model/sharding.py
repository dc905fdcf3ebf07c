"""Sharded training (FSDP2): each process holds a part of every weight, and with it of its gradient and its optimizer state.

The weights of one transformer block are gathered when the block runs and freed afterwards. The others (embeddings, final
norm, LM head, task head) are gathered once for each pass, so that the chunked LM head reads them as in one process. All
processes must run the same passes, since each takes part in every gathering.

With bf16, blocks gather and compute in bf16, norms included; the weights that the optimizer updates, and sums of gradients
over processes, are in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import RefusedError
from .mixed_model import MixedModel

PASSES = ("lm_token_losses", "head_losses", "finetune_logits", "routing")
"""Methods of `MixedModel` besides `forward` that a sharded model can run."""


STATE_BYTES = 16
"""Bytes of a trained weight, its gradient and the two moments of AdamW, in float32. A weight that is not trained has four."""
LARGEST_SHARE = 0.7
"""Share of a device's memory that they may fill if every process holds all of them. The rest is for activations."""


def fits(models: Iterable[nn.Module], device_bytes: int) -> bool:
    """Tells whether a device can hold the weights of some models, and what is needed to train those that are trained."""
    weights = [weight for model in models for weight in model.parameters()]
    needed = sum(weight.numel() * (STATE_BYTES if weight.requires_grad else 4) for weight in weights)
    return needed <= LARGEST_SHARE * device_bytes


def shard(model: MixedModel, device: torch.device, precision: str) -> None:
    """Shards the weights of a model over all processes, in place.

    Weights that are mapped from files are not copied as a whole: the process reads its part of each. Weights of half precision
    are converted to float32, as trained weights must be, one block after the other.

    Args:
        model: on the CPU, so that it need not fit on the device.
        device: device of this process.
        precision: of the matrix products.

    Raises:
        RefusedError: if the model has a weight without dimensions, which cannot be sharded.
    """
    scalar = next((name for name, weight in model.named_parameters() if not weight.ndim), None)
    if scalar is not None:
        raise RefusedError(f"parallelism: fsdp cannot shard the weight {scalar}, which is a single number; use ddp")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16" else {}
    for block in _blocks(model):
        to_float32(block)
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**low, cast_forward_inputs=False))
    to_float32(model)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for method in PASSES:
        register_fsdp_forward_method(model, method)


def to_float32(module: nn.Module) -> None:
    """Converts weights of half precision that are not sharded yet."""
    for weight in module.parameters():
        if weight.is_floating_point() and weight.element_size() < 4 and not isinstance(weight, DTensor):
            weight.data = weight.data.float()


def _blocks(model: MixedModel) -> list[nn.Module]:
    """Returns the transformer blocks: the entries of the backbone's largest list of modules."""
    lists = [module for module in model.lm.base_model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()), default=[]))


def release(model: nn.Module) -> None:
    """Frees weights that were gathered for passes without a backward pass. The next pass gathers them anew."""
    if is_sharded(model):
        cast(FSDPModule, model).reshard()


def is_sharded(model: nn.Module) -> bool:
    """Tells whether the weights of a model are sharded over processes."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor, sharing memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with the parts of all processes, which all take part; the tensor itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(full: Tensor, other: Tensor) -> Tensor:
    """Returns a tensor that every process has in full, sharded like another; the tensor itself if the other is not sharded."""
    if not isinstance(other, DTensor):
        return full.to(other.device, other.dtype)
    on_device = full.to(other.device, other.dtype)
    return distribute_tensor(on_device, other.device_mesh, other.placements, src_data_rank=None)


def sum_over_shards(model: nn.Module, value: Tensor) -> Tensor:
    """Adds up values of the processes' parts of a sharded model. Without shards, every process has the value already."""
    if is_sharded(model):
        all_reduce(value)
    return value


def most_passes(model: nn.Module, count: int, device: torch.device) -> int:
    """Returns how many passes a process must run that needs `count` of them: as many as any other, if the model is sharded."""
    if not is_sharded(model):
        return count
    most = torch.tensor(count, device=device)
    all_reduce(most, ReduceOp.MAX)
    return int(most)
