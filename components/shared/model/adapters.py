"""Model folders that hold a low-rank adapter (LoRA, arXiv:2106.09685) in peft's format beside the files of its base model.

    config.json, model*.safetensors     the base model; the weights are hard links where the file system allows it
    adapter_config.json                 peft's configuration, with the name or the path of the base model
    adapter_model.safetensors           the adapter, and the task head with everything else that was trained

transformers loads such a folder as one model, wherever it is (`AutoModelFor....from_pretrained`). The two files of the adapter
are one by themselves: peft loads them on top of the base model.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RefusedError
from .mixed_model import MixedModel
from .sharding import release, whole
from .weight_files import INDEX, stored_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_ADAPTER = ".default"  # peft's name of the only adapter, which its files leave out
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def has_adapter(folder: str | Path) -> bool:
    """Tells whether a model folder holds an adapter."""
    return (Path(folder) / CONFIG).is_file()


def is_adapted(model: MixedModel) -> bool:
    """Tells whether a model has adapters that are not merged."""
    return any(".lora_A." in name for name, _ in model.lm.named_parameters())


def save_adapted(
    model: MixedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    revision: str | None,
    main: bool = True,
) -> None:
    """Writes a model with adapters. If it is sharded, all processes take part.

    Args:
        base: folder or hub name of the base model's weights.
        revision: hub revision of `base`.
        main: whether this process writes.

    Raises:
        RefusedError: if the base model is itself an adapter.
    """
    release(model)
    adapted = {
        name.replace(_PEFT_PREFIX, "").replace(_ADAPTER, ""): weight
        for name, weight in model.lm.named_parameters()
        if ".lora_" in name or ".pooler." in name
    }
    head = model.task.state_dict() if model.task is not None else {}
    saved = {f"{_PEFT_PREFIX}{name}": whole(weight.detach()).cpu() for name, weight in (adapted | head).items()}
    if not main:
        return
    base = str(Path(base).absolute()) if Path(base).is_dir() else base
    # transformers loads a model in the number format that config.json names. The adapter was trained on this one.
    model.config.dtype = model.config.get_text_config().dtype = next(model.lm.parameters()).dtype
    model.save_description(folder, tokenizer)
    _link_weights(folder, base, revision)
    save_file(
        {name: weight.contiguous() for name, weight in saved.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    _config_of(model, model.lm.base_model_prefix, base, revision).save_pretrained(str(folder))


def _config_of(model: MixedModel, prefix: str, base: str, revision: str | None) -> Any:
    """Returns peft's configuration of the whole model, in which the one of the backbone has the names of the whole."""
    trained: Any = model.lm.get_submodule(prefix)
    made = trained.peft_config["default"]
    adapted = {
        name.split(".lora_A.")[0].rpartition(".")[2] for name, _ in trained.named_parameters() if ".lora_A." in name
    }
    made.target_modules = rf"{prefix}\.(?!pooler\.)(.*\.)?({'|'.join(sorted(adapted))})"
    poolers = ["pooler"] if any(".pooler." in name for name, _ in trained.named_parameters()) else []
    made.exclude_modules = None
    heads = [name for name, module in model.task.named_children() if list(module.parameters())] if model.task else []
    made.modules_to_save = [*heads, *poolers] or None
    class_name = type(model.task or model.lm).__name__
    made.task_type = next((kind for end, kind in _TASK_TYPES.items() if class_name.endswith(end)), None)
    if made.task_type is None:
        made.auto_mapping = {"base_model_class": class_name, "parent_library": type(model.lm).__module__}
    made.base_model_name_or_path, made.revision = base, revision
    made.inference_mode = True
    return made


def local_folder(name: str, revision: str | None) -> str:
    """Returns the folder of a model's files, which are downloaded if it is a name on the hub and they are not here."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    return str(
        snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"])
    )


def _link_weights(folder: Path, base: str, revision: str | None) -> None:
    """Brings the weight files of the base model into a folder."""
    base = local_folder(base, revision)
    if has_adapter(base):
        raise RefusedError(
            f"mixed.controls.lora_merge: is false, but the base model {base} is itself an adapter, and an adapter cannot be "
            "saved on top of it; set it to true"
        )
    files = {tensor.file for tensor in stored_tensors(Path(base))[0].values()}
    files |= {file for file in [Path(base) / INDEX] if file.is_file()}
    for file in sorted(files):
        (folder / file.name).unlink(missing_ok=True)
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:  # another file system
            shutil.copyfile(file, folder / file.name)


def attach_saved(lm: PreTrainedModel, folder: str | Path, merge: bool = True) -> PreTrainedModel:
    """Adds the adapter of a folder to its base model.

    Args:
        lm: the base model; changed in place.
        merge: whether the adapter becomes part of the weights.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.modules_to_save, config.task_type, config.inference_mode = None, None, False
    config.base_model_name_or_path = lm.name_or_path  # peft warns of any other
    with torch.random.fork_rng(devices=[]):  # new adapters draw random numbers
        adapted = get_peft_model(lm, config)
    set_peft_model_state_dict(
        adapted, {name: weight for name, weight in load_file(Path(folder) / WEIGHTS).items() if ".lora_" in name}
    )
    plain: PreTrainedModel = adapted.merge_and_unload() if merge else adapted.get_base_model()
    return plain


def saved_modules(folder: str | Path) -> dict[str, Tensor]:
    """Returns the trained weights of a folder's adapter besides the adapter itself: those of the task head, by name."""
    if not has_adapter(folder):
        return {}
    saved = load_file(Path(folder) / WEIGHTS)
    return {name.removeprefix(_PEFT_PREFIX): weight for name, weight in saved.items() if ".lora_" not in name}
