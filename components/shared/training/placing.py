"""Puts the models of a training on the devices of its processes, whole or sharded, and takes whole ones back."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..config import Training
from ..model.mixed_model import MixedModel
from ..model.quantization import is_quantized
from ..model.sharding import fits, is_sharded, shard, to_float32


def shards(training: Training, models: list[MixedModel], accelerator: Accelerator) -> bool:
    """Tells whether the processes share the models' weights."""
    if accelerator.num_processes == 1 or training.parallelism == "ddp" or any(map(is_quantized, models)):
        return False
    if training.parallelism == "fsdp":
        return True
    device = accelerator.device
    return (
        device.type == "cuda"
        and not training.compile
        and not fits(models, torch.cuda.get_device_properties(device).total_memory)
    )


def place_model(model: MixedModel, sharded: bool, device: torch.device, precision: str) -> MixedModel:
    """Puts the model on this process's device, sharded or whole, and returns it."""
    if not sharded:
        model.to(device)
        to_float32(model)
        return model
    if not is_sharded(model):
        shard(model, device, precision)
    return model


def undo(accelerator: Accelerator, wrapped: torch.nn.Module, model: MixedModel, training: Training) -> None:
    """Returns a model that is not sharded to its original form: unwrapped, on the CPU."""
    # accelerate also wraps `forward`; unwrap it too.
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).to("cpu")
    if training.gradient_checkpointing:
        model.lm.gradient_checkpointing_disable()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
