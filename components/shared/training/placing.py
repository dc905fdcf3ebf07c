"""Puts the models of a training on the devices of its processes, whole or sharded, and takes them back."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from ..config import Training
from ..model.mixed_model import MixedModel
from ..model.quantization import is_quantized
from ..model.sharding import fits, gather, is_sharded, shard
from .lora import merge_adapters


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
    """Returns the model on this process's device: a sharded copy, or the model itself."""
    return model.to(device) if not sharded or is_sharded(model) else shard(model, device, precision)


def undo(
    accelerator: Accelerator,
    wrapped: torch.nn.Module,
    trained: MixedModel,
    model: MixedModel,
    training: Training,
    merge: bool,
) -> None:
    """Returns the model to its original form: unwrapped, with plain weights, on the CPU.

    After a sharded training, the first process only has weights.
    """
    if is_sharded(trained):
        gather(trained, model, accelerator.is_main_process)
        if not accelerator.is_main_process:
            return
        if merge:
            merge_adapters(model)
    else:
        # accelerate also wraps `forward`; unwrap it too.
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False).to("cpu")
    if training.gradient_checkpointing:
        model.lm.gradient_checkpointing_disable()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
