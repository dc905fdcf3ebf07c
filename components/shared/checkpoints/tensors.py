"""The tensors in a checkpoint: trained weights, and the optimizer's states of each.

A training whose processes all hold the same tensors writes them to `weights.safetensors` and `optimizer.safetensors`. In a
sharded training each process writes its parts to a file of its own, with torch.distributed.checkpoint. Both are safetensors,
and each process reads what it needs from either: a checkpoint can be resumed by any number of processes, sharded or not.
Loading it cannot execute code, unlike with that package's own format, which holds pickled metadata.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import MixtuneError
from ..model.mixed_model import MixedModel


def trained_weights(model: MixedModel) -> dict[str, Tensor]:
    """Returns the weights that are trained, by name."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def optimizer_states(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns the optimizer's states, named `<parameter number>.<state name>`: tensors, and those that are single numbers."""
    states = {
        f"{number}.{name}": value.detach()
        for number, of_parameter in optimizer.state_dict()["state"].items()
        for name, value in of_parameter.items()
    }
    tensors = {name: value for name, value in states.items() if value.ndim}
    return tensors, {name: float(value) for name, value in states.items() if not value.ndim}


def write_parts(folder: Path, tensors: Mapping[str, Tensor], group: Any) -> None:
    """Writes this process's parts of sharded tensors. All processes take part.

    Raises:
        Exception: what any of the processes raised.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@torch.no_grad()
def read_tensors(folder: Path, model: MixedModel, optimizer: Optimizer, numbers: Mapping[str, float]) -> None:
    """Restores weights and optimizer states. Each process reads its parts.

    Args:
        numbers: the states that are single numbers.

    Raises:
        MixtuneError: if the checkpoint is of another model.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    weights = trained_weights(model)
    of_optimizer = {name for name in saved if name[0].isdigit()}
    if weights.keys() != saved.keys() - of_optimizer:
        raise MixtuneError("checkpoints: the checkpoint's weights are not those of the model; remove it and run again")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {name: torch.zeros_like(parameters[int(name.split(".")[0])]) for name in of_optimizer}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load({**weights, **states}, storage_reader=reader, no_dist=True)
    by_number: dict[int, dict[str, Tensor]] = {}
    for key, value in {**states, **{key: torch.tensor(number) for key, number in numbers.items()}}.items():
        number, name = key.split(".", 1)
        by_number.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
