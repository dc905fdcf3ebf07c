"""Creates a `MixedModel`: loads it, initialises it randomly, interpolates two models, adds a head."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..artifacts import read_json
from ..config import Objective, Scratch, Task
from ..errors import RefusedError
from ..task_kinds import TASK_KINDS
from .adapters import attach_saved, has_adapter, local_folder, saved_modules
from .checks import check_model, check_task_head
from .expert_types import expert_problem
from .heads import make_head
from .mixed_model import MixedModel, objective_of
from .quantization import quantizing
from .weight_files import shown, stored_tensors

_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


def add_task_head(model: MixedModel, kind: Task, labels: list[str] | None, seed: int) -> None:
    """Adds a task head to a model, unless it has one for this task and these labels, and checks the head.

    Raises:
        RefusedError: if models of this type have no such head, or if the head cannot be run on packed rows.
    """
    before = model.task
    model.add_head(kind, labels, seed)
    if model.task is not None and model.task is not before:
        check_task_head(model)


def from_scratch(
    scratch: Scratch,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    objective: Objective = "causal_lm",
    attention: str = "auto",
    device: torch.device | str = "cpu",
) -> MixedModel:
    """Creates a new Llama, or for masked LM a new BERT, with random weights that only the seed determines."""
    set_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": scratch.hidden_size,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "max_position_embeddings": max(max_length, 512),
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if objective == "masked_lm":
        # No dropout: it helps in many passes over little data, and pretraining makes few passes.
        sizes |= {"intermediate_size": 4 * scratch.hidden_size, "hidden_dropout_prob": 0.0}
        model = MixedModel(BertForMaskedLM(BertConfig(attention_probs_dropout_prob=0.0, **sizes)))
    else:
        intermediate_size = -(-scratch.hidden_size * 8 // 3 // 16) * 16
        config = LlamaConfig(intermediate_size=intermediate_size, num_key_value_heads=scratch.heads, **sizes)
        model = MixedModel(LlamaForCausalLM(config))
    model.to(device)
    model.set_attention(attention)
    check_model(model, "scratch")
    return model


def load_model(
    folder: str | Path,
    device: torch.device | str = "cpu",
    as_stored: bool = False,
    revision: str | None = None,
    attention: str = "auto",
    quantized: bool = False,
) -> MixedModel:
    """Loads a model folder (or a hub model), including its head if it has one.

    If the folder's card names other weights (a base model that is used unchanged), those are loaded. An adapter is merged,
    unless the weights are quantised.

    Args:
        as_stored: whether to load the weights in half precision if all are stored so: weights that are not converted are mapped
            from their files, not copied. Otherwise they are loaded in float32.
        quantized: whether to quantise the weights to 4 bits. If the card says so, they are in any case.

    Raises:
        RefusedError: if it is no language model in safetensors, or if mixtune does not reproduce its architecture.
    """
    given = str(folder)
    folder, revision = weights_location(given, revision)
    quantized = quantized or bool(_card(given).get("quantized"))
    # transformers would add the adapter by itself, and keep it apart from the weights.
    adapted = {"adapter_kwargs": {"subfolder": "none"}} if has_adapter(folder) else {}
    as_stored = as_stored and not quantized and not adapted
    if as_stored:
        folder, revision = local_folder(folder, revision), None
    in_bits = quantizing(torch.device(device)) if quantized else {}
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
        if problem := expert_problem(config.to_dict(), folder):
            raise RefusedError(problem)
        masked = objective_of(config) == "masked_lm"
        auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        load = partial(
            auto.from_pretrained,
            folder,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
            **adapted,
            **in_bits,
        )
        lm, loading_info = load(dtype=_stored_dtype(folder) if as_stored else torch.float32)
        if any(map(_is_half, lm.buffers())):
            # transformers rounds constants of the model too, such as a factor of its embeddings.
            lm, loading_info = load(dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RefusedError(f"model.base: {folder} cannot be loaded as a language model ({reason})") from None
    if loading_info["mismatched_keys"]:
        name, stored, wanted = min(loading_info["mismatched_keys"])
        raise RefusedError(
            f"model.base: {_file_of(name, folder)}: {name} has the shape {shown(stored)}, but config.json asks for "
            f"{shown(wanted)}; they do not belong together, download both again"
        )
    if adapted:
        lm = attach_saved(lm, folder, merge=not quantized)
    try:
        model = MixedModel(lm)
    except Exception as error:  # models of other kinds can fail in any way
        raise RefusedError(
            f"model.base: {folder} is of type {config.model_type}, which cannot be run on plain token ids "
            f"({type(error).__name__}); use another architecture"
        ) from None
    model.new_weights = sorted(
        name for name in loading_info["missing_keys"] if not name.startswith(f"{lm.base_model_prefix}.")
    )
    broken = sorted(name for name in loading_info["missing_keys"] if name.startswith(f"{lm.base_model_prefix}."))
    if broken:
        raise RefusedError(f"model.base: {folder} lacks the weights {', '.join(broken[:3])}, so it is not whole")
    if folder == given:  # the head of a base model belongs to another task
        _load_head(model, folder)
    model.to(device)
    model.set_attention(attention)
    check_model(model, folder)
    return model


@torch.no_grad()
def refuse_not_finite(model: MixedModel, folder: str) -> None:
    """Refuses a base model with weights that are not finite: its losses would not be finite either.

    Raises:
        RefusedError: names the files and the tensors.
    """
    broken = [(name, int((~weight.isfinite()).sum())) for name, weight in model.lm.named_parameters()]
    named = [
        f"model.base: {_file_of(name, folder)}: {name} has {count:,} values that are not finite; download the model again, or "
        "choose another"
        for name, count in broken
        if count
    ]
    if named:
        raise RefusedError(
            *named[:3], *([f"model.base: {len(named) - 3} more tensors are like this"] if named[3:] else [])
        )


def _file_of(name: str, folder: str) -> str:
    """Returns the file of a weight, or the model's name if it is not a local folder. Files can omit the backbone's prefix."""
    stored = stored_tensors(Path(folder))[0] if Path(folder).is_dir() else {}
    found = stored.get(name) or stored.get(name.partition(".")[2])
    return str(found.file) if found else folder


def weights_location(folder: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Returns the folder or hub name of a model's weights, and the revision: those of a base model that is used unchanged."""
    card = _card(folder)
    if card.get("weights"):
        return weights_location(card["weights"], card.get("revision"))
    return str(folder), revision


def _stored_dtype(folder: str) -> torch.dtype:
    """Returns the number format of half precision that all weights of a folder have, else float32."""
    found = {tensor.dtype for tensor in stored_tensors(Path(folder))[0].values()}
    return _HALF.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _HALF.values()


def _card(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / "mixtune.json"
    return dict(read_json(file, "a model made by mixtune")) if file.is_file() else {}


def _load_head(model: MixedModel, folder: str) -> None:
    """Loads the head of a model folder. The configuration names its task; its weights are stored with the others."""
    config: Any = model.config
    name = (config.architectures or [""])[0]
    kind = next(
        (
            kind
            for kind, row in TASK_KINDS.items()
            if row.head and name.endswith(row.auto_class.removeprefix("AutoModel"))
            if row.problem_type in (None, config.problem_type)
        ),
        None,
    )
    stored = stored_tensors(Path(folder))[0] if Path(folder).is_dir() else {}
    if kind is None or not stored:
        return
    trained = saved_modules(folder)
    named = TASK_KINDS[kind].has_label_names
    labels = [config.id2label[index] for index in range(config.num_labels)] if named else None
    try:
        task = make_head(model.lm, kind, labels, seed=0)
    except RefusedError:
        return  # a base model's own head, which is not trained here
    wanted = task.state_dict() | {name: value for name, value in model.lm.state_dict().items() if ".pooler." in name}
    shapes = {name: tuple(tensor.shape) for name, tensor in (stored | trained).items()}
    if any(shapes.get(name) != tuple(weight.shape) for name, weight in wanted.items()):
        return
    for key, weight in wanted.items():
        if key in trained:
            weight.copy_(trained[key])
            continue
        with safe_open(stored[key].file, framework="pt") as tensors:
            weight.copy_(tensors.get_tensor(key))
    model.task, model.kind, model.labels = task, kind, labels


class Interpolation:
    """Interpolates the weights of two models: (1 - α) · pretrained + α · finetuned (WiSE-FT, arXiv:2109.01903).

    Both are loaded once, for any number of α. The task head is that of the fine-tuned model; the pretrained model has none.

    Args:
        pretrained: model folder of the pretrained end.
        finetuned: model folder of the fine-tuned end.
        device: device of the interpolated model. The ends stay in main memory.
    """

    def __init__(self, pretrained: str | Path, finetuned: str | Path, device: torch.device | str = "cpu") -> None:
        self._model, start = load_model(finetuned, device), load_model(pretrained)
        # Parameters instead of the state dict, which lists tied weights twice: they would be interpolated twice.
        theirs = dict(start.lm.named_parameters())
        self._ends = {
            name: (theirs[name].detach().to(weight.dtype), weight.detach().to("cpu", copy=True))
            for name, weight in self._model.lm.named_parameters()
            if name in theirs  # an encoder's pooler belongs to the task head
        }

    @torch.no_grad()
    def at(self, alpha: float) -> MixedModel:
        """Returns the interpolated model. It is the same object for every α: the next call changes its weights."""
        weights = dict(self._model.lm.named_parameters())
        for name, (start, end) in self._ends.items():
            weights[name].copy_(end.lerp(start, 1 - alpha))
        return self._model


def interpolate(
    pretrained: str | Path, finetuned: str | Path, alpha: float, device: torch.device | str = "cpu"
) -> MixedModel:
    """Returns one interpolated model; see `Interpolation`."""
    return Interpolation(pretrained, finetuned, device).at(alpha)
