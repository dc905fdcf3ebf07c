"""Writes a sharded model in Hugging Face format without any process holding it whole: one tensor is gathered at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ..artifacts import write_json
from .mixed_model import MixedModel
from .sharding import release, whole
from .weight_files import INDEX, WEIGHTS

SHARE_OF_A_FILE, SMALLEST_FILE, LARGEST_FILE = 1 / 8, 50_000_000, 2_000_000_000
"""A file holds this share of the model, but at least and at most so many bytes; a larger tensor has a file of its own."""


class _Files:
    """Collects tensors and writes them to files of limited size.

    Args:
        folder: where the files are written.
        file_bytes: size from which a file is written.
    """

    def __init__(self, folder: Path, file_bytes: int) -> None:
        self._folder, self._file_bytes = folder, file_bytes
        self._tensors: dict[str, Tensor] = {}
        self._written: list[tuple[Path, list[str]]] = []
        self._bytes = 0
        for file in folder.glob("model*.safetensors*"):
            file.unlink()

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Adds tensors on the CPU."""
        waiting = sum(tensor.nbytes for tensor in self._tensors.values())
        if waiting and waiting + sum(tensor.nbytes for tensor in tensors.values()) > self._file_bytes:
            self._write()
        self._tensors |= {name: tensor.contiguous() for name, tensor in tensors.items()}

    def close(self) -> None:
        """Writes what is left, gives the files their names, and writes their index if there are several."""
        self._write()
        count = len(self._written)
        if count == 1:
            self._written[0][0].rename(self._folder / WEIGHTS)
            return
        names: dict[str, str] = {}
        for number, (file, tensors) in enumerate(self._written, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            file.rename(self._folder / name)
            names |= dict.fromkeys(tensors, name)
        write_json(
            self._folder / INDEX, {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(names.items()))}
        )

    def _write(self) -> None:
        file = self._folder / f"model-part-{len(self._written)}.safetensors"
        save_file(self._tensors, file, metadata={"format": "pt"})
        self._bytes += sum(tensor.nbytes for tensor in self._tensors.values())
        self._written.append((file, list(self._tensors)))
        self._tensors = {}


@torch.no_grad()
def save_sharded(model: MixedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase, main: bool) -> None:
    """Writes a sharded model and its tokenizer. All processes take part.

    Args:
        main: whether this process writes.
    """
    release(model)
    named = model.lm.state_dict(keep_vars=True)
    if model.task is not None:
        named |= model.task.state_dict(keep_vars=True)
    once = {id(weight): (name, weight) for name, weight in reversed(named.items())}  # tied weights: their first name
    total = sum(weight.numel() * weight.element_size() for _, weight in once.values())
    size = int(min(LARGEST_FILE, max(SMALLEST_FILE, SHARE_OF_A_FILE * total)))
    files = _Files(Path(folder), size) if main else None
    for name, weight in reversed(once.values()):
        full = whole(weight.detach())
        if files is not None:
            files.add(revert_weight_conversion(model.lm, {name: full.cpu()}))
    if files is not None:
        files.close()
        # A model that was stored in bf16 was trained in float32. transformers loads it as config.json says.
        model.config.dtype = model.config.get_text_config().dtype = next(model.lm.parameters()).dtype
        model.save_description(folder, tokenizer)
