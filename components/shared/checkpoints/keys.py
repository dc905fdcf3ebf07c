"""Selects the checkpoint store of a training by a hash of everything that the result depends on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from ..code_digest import TRAINING, code_digest
from ..model.mixed_model import MixedModel
from ..running.context import Context
from .resume import TrainingJob
from .store import CHECKPOINT_DIR, CheckpointStore, folder_of, is_url

NOT_IN_KEY = frozenset({"checkpoint_minutes", "checkpoint_steps", "parallelism"})


def find_store(
    job: TrainingJob | None, model: MixedModel, others: list[MixedModel], layout: Mapping[str, Any], context: Context
) -> CheckpointStore | None:
    """Returns the checkpoint store of a training, in MIXTUNE_CHECKPOINT_DIR (a folder or an fsspec URL).

    Args:
        job: the training's title and identity; None disables checkpoints.
        model: the model before training.
        others: further models that the training reads.
        layout: device and precision, which affect rounding. The number of processes affects it too, but is no part of the key:
            a training may go on with fewer or more GPUs.
    """
    root = os.environ.get(CHECKPOINT_DIR, "")
    if job is None or not root:
        if job is not None:
            context.say(f"{job.title}: no checkpoints are kept inside the training, since {CHECKPOINT_DIR} is not set")
        return None
    key = content_key({**job.identity, **layout}, [model, *others])
    name = f"{re.sub(r'[^A-Za-z0-9.+-]', '_', job.title)}-{key[:16]}"
    if is_url(root):
        from .remote import RemoteCheckpointStore

        return RemoteCheckpointStore(f"{root.rstrip('/')}/{name}", key, context.say)
    return CheckpointStore(folder_of(root) / name, key, context.say)


def content_key(identity: Mapping[str, Any], models: list[MixedModel]) -> str:
    """Returns the SHA-256 of everything that a training's result depends on: settings, data, models, code and libraries."""
    digest = hashlib.sha256(json.dumps(_without(NOT_IN_KEY, identity), sort_keys=True, default=str).encode())
    digest.update(code_digest(TRAINING).encode())
    for package in ("torch", "transformers", "accelerate", "peft", "numpy"):
        digest.update(f"{package}=={version(package)}".encode())
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor = tensor.float()  # as in a training that converts its weights when it loads them
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without(names: frozenset[str], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without(names, inner) for name, inner in value.items() if name not in names}
    return value
