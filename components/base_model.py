"""Checks of the base model's folder: configuration, tokenizer and the headers of its weight files. No torch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from .config import Config
from .shared.config import EMBEDDED, SCRATCH
from .shared.model.device import ON_GPU, has_gpu
from .shared.model.expert_types import ADAPTED_EXPERTS, COMPILED_EXPERTS, expert_problem, has_experts
from .shared.model.quantization import missing_for_4_bits
from .shared.model.refusals import (
    CAUSAL_ATTENTION,
    MASKED_WRITES_NOTHING,
    NO_ENDS,
    NO_GPU,
    NO_HEAD,
    NO_LM_HEAD,
    NO_MASK,
    OTHER_OBJECTIVE,
    OTHER_PREFIX,
    TOO_LARGE_ID,
)
from .shared.model.weight_files import StoredTensor, shown, stored_tensors
from .shared.section import known
from .shared.task_kinds import TASK_KINDS, Head
from .shared.third_party.transformers_sources import auto_classes, base_prefixes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")
"""Where tokenizers keep chat templates, besides their configuration."""
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that have no special tokens besides those in their files."""
HEADS: dict[Head, str] = {
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "span": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
"""transformers' names of the classes with a task head, by model type."""
HUB_SECONDS = 5
"""Time in which the hub must answer."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight", "embed_in.weight")
"""Ends of the names of token embeddings."""
WIDTHS = ("embedding_size", "word_embed_proj_dim", "hidden_size", "n_embd", "d_model", "dim", "emb_dim")
"""Names of the embeddings' width in config.json."""
LM_HEADS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bert", "deberta", "deberta-v2"), ("cls.predictions.", "lm_predictions.")),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), ("lm_head.",)),
    "albert": ("predictions.",),
    "distilbert": ("vocab_",),
    "electra": ("generator_",),
    "modernbert": ("decoder.",),
}
"""Beginnings of the names of a masked LM's head by model type."""


def model_problems(config: Config) -> list[str]:
    """Returns what is wrong with the base model, one sentence for each problem."""
    base = config.model.base
    if base == SCRATCH:
        return _masked_attention_problems(config, "bert") if config.model.objective == "masked_lm" else []
    if base == EMBEDDED:
        return ["model.base: embedded is a data source, not a model; use scratch, a folder or a hub name"]
    if not looks_local(base):
        if not _is_hub_name(base):
            return [f"model.base: {base} is neither scratch, nor a folder, nor a hub name such as owner/name"]
        if Path(base).exists():  # transformers would take it
            return [
                f"model.base: {base} is a folder in the working directory, but the configuration file is in another folder, to "
                "which its paths are relative; write the absolute path"
            ]
        return _hub_problems(config)
    folder = Path(base)
    if not folder.is_dir():
        return [f"model.base: there is no folder {base}"]
    config_file = folder / "config.json"
    if not config_file.is_file():
        return [f"model.base: {base} has no config.json, so it is no model in Hugging Face format"]
    try:
        model_config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(model_config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        return [f"model.base: {config_file} cannot be read as JSON ({error})"]
    return [
        *known(lambda: _type_problems(config, model_config)),
        *known(lambda: _expert_problems(config, model_config)),
        *known(lambda: _length_problems(config, model_config)),
        *known(lambda: _weight_problems(config, model_config)),
        *_tokenizer_problems(folder, model_config),
    ]


def looks_local(base: str) -> bool:
    """Tells whether a base model is a folder rather than a name on the hub. Relative paths of folders were made absolute."""
    return base.startswith((".", "/"))


def _hub_problems(config: Config) -> list[str]:
    model_config, problem = hub_config(config.model.base, config.model.revision)
    if problem:
        return [problem]
    if model_config is None:
        return []
    return [
        *known(lambda: _type_problems(config, model_config)),
        *known(lambda: _expert_problems(config, model_config)),
        *known(lambda: _length_problems(config, model_config)),
    ]


@cache
def hub_config(base: str, revision: str | None) -> tuple[dict[str, Any] | None, str]:
    """Returns the config.json of a model on the hub, and what is wrong with its name.

    The file comes from the hub or from the hub's cache on this machine; None if neither is in reach.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download

    at = f" at the revision {revision}" if revision else ""
    sentences: dict[type[Exception], str] = {
        errors.LocalEntryNotFoundError: "",  # a kind of EntryNotFoundError: neither the hub nor its cache is in reach
        errors.GatedRepoError: f"model.base: access to {base} on the Hugging Face hub is restricted; ask for it there and set "
        "HF_TOKEN",
        errors.RepositoryNotFoundError: f"model.base: there is no model {base} on the Hugging Face hub, or it is private and "
        "HF_TOKEN does not open it",
        errors.RevisionNotFoundError: f"model.revision: {base} has no revision {revision} on the Hugging Face hub",
        errors.EntryNotFoundError: f"model.base: {base} has no config.json on the Hugging Face hub{at}, so it is no model in "
        "Hugging Face format",
    }
    try:
        try:
            HfApi().model_info(base, revision=revision, timeout=HUB_SECONDS)  # without retries
            is_away = False
        except Exception as error:
            if isinstance(error, tuple(sentences)):
                raise
            is_away = True
        file = hf_hub_download(base, "config.json", revision=revision, local_files_only=is_away)
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except Exception as error:  # whatever else is wrong, the steps that load the model report it in full
        return None, next((text for kind, text in sentences.items() if isinstance(error, kind)), "")
    return found if isinstance(found, dict) else None, ""


def _is_hub_name(base: str) -> bool:
    parts = base.split("/")
    return len(parts) <= 2 and all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts)


def attention_problems(config: Config, where: str, gpu: bool) -> list[str]:
    """Returns the stages whose attention needs a GPU, if there is none.

    Args:
        where: `here`, or where the steps run.
        gpu: whether there is one.
    """
    return [
        NO_GPU.format(option=f"{stage}.attention", attention=attention, where=where)
        for stage, attention in _attention(config).items()
        if attention in ON_GPU and not gpu
    ]


def missing_gpu_here(config: Config) -> list[str]:
    """Returns what a run on this machine lacks, one sentence for each option."""
    quantized = missing_for_4_bits("this machine", has_gpu()) if config.mixed.controls.in_4_bits else []
    return attention_problems(config, "here", has_gpu()) + quantized


def notes(config: Config, folder: Path) -> list[str]:
    """Returns what a user should know about the name of the base model, although it is valid.

    Args:
        folder: folder of the configuration file.
    """
    base = config.model.base
    owner, slash, _ = base.partition("/")
    if looks_local(base) or not slash or not any((one / owner).is_dir() for one in (folder, Path())):
        return []
    return [
        f"model.base: {base} is taken as a name on the Hugging Face hub, because there is no such folder, although there is a "
        f"folder {owner}; correct the name if you mean a folder in it"
    ]


def _attention(config: Config) -> dict[str, str]:
    stages = {"pretrain": config.pretrain, "finetune": config.finetune, "mixed": config.mixed}
    return {name: stage.attention for name, stage in stages.items()}


def _type_problems(config: Config, model_config: dict[str, Any]) -> list[str]:
    """Compares the model's type with the objective, the task and the attention."""
    is_masked = is_masked_type(model_config)
    known = auto_classes(f"MODEL_FOR_{'MASKED' if is_masked else 'CAUSAL'}_LM_MAPPING_NAMES")
    kind = model_config.get("model_type")
    if known is None or not isinstance(kind, str):
        return []
    base, task, objective = config.model.base, config.data.finetune.task, config.model.objective
    lm = known.get(kind)
    if lm is None:
        return [f"model.base: {base} is of type {kind}, for which transformers has no language model; choose another"]
    problems = []
    own = "masked_lm" if is_masked else "causal_lm"
    if objective is not None and objective != own:
        problems.append(OTHER_OBJECTIVE.format(objective=objective, base=base, type=kind, own=own))
    head = TASK_KINDS[task].head
    if head is None and is_masked:
        problems.append(MASKED_WRITES_NOTHING.format(task=task, type=kind))
    if head is not None:
        chosen = (auto_classes(HEADS[head]) or {}).get(kind)
        prefixes = base_prefixes(kind)
        common = next((prefix for name, prefix in prefixes.items() if name.endswith("PreTrainedModel")), None)
        if chosen is None:
            problems.append(NO_HEAD.format(task=task, type=kind))
        elif prefixes.get(chosen, common) != prefixes.get(lm, common):
            problems.append(OTHER_PREFIX.format(task=task, head=chosen, lm=lm))
    if is_masked:
        problems += _masked_attention_problems(config, kind)
    return problems


def is_masked_type(model_config: dict[str, Any]) -> bool:
    """Tells whether mixtune trains models of this type as masked language models."""
    masked = auto_classes("MODEL_FOR_MASKED_LM_MAPPING_NAMES") or {}
    return model_config.get("model_type") in masked and not model_config.get("is_decoder")


def _masked_attention_problems(config: Config, kind: str) -> list[str]:
    return [
        CAUSAL_ATTENTION.format(option=f"{stage}.attention", attention=attention, type=kind)
        for stage, attention in _attention(config).items()
        if attention not in ("auto", "sdpa", "eager")
    ]


def lacks_chat_template(config: Config) -> bool:
    """Tells whether chats cannot be rendered; False also if that is not known, as for a model on the hub."""
    base = config.model.base
    folder = Path(base)
    if config.model.chat_template is not None or not (base == SCRATCH or (looks_local(base) and folder.is_dir())):
        return False
    own = _json_object(folder / "tokenizer_config.json").get("chat_template")
    return base == SCRATCH or not (own or any((folder / name).exists() for name in TEMPLATES))


def _expert_problems(config: Config, model_config: dict[str, Any]) -> list[str]:
    problem = expert_problem(model_config, config.model.base)
    if problem or not has_experts(model_config):
        return [problem] if problem else []
    stages = {"pretrain": config.pretrain, "finetune": config.finetune, "mixed": config.mixed}
    problems = [COMPILED_EXPERTS.format(option=f"{name}.compile") for name, stage in stages.items() if stage.compile]
    controls = config.mixed.controls
    return problems + ([ADAPTED_EXPERTS] if controls.lora_ranks and not controls.lora_merge else [])


def _length_problems(config: Config, model_config: dict[str, Any]) -> list[str]:
    positions = model_config.get("n_positions") or model_config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions >= config.model.max_length:
        return []
    return [
        f"model.max_length: is {config.model.max_length}, but the model in {config.model.base} has only {positions} positions"
    ]


def _weight_problems(config: Config, model_config: dict[str, Any]) -> list[str]:
    folder = Path(config.model.base)
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        hint = "; its weights are in .bin files, which can run code when loaded: convert them" if pickled else ""
        return [f"model.base: {folder} has no .safetensors file{hint}"]
    tensors, problems = stored_tensors(folder)
    if problems:
        return [f"model.base: {problem}" for problem in problems]
    problems = _shape_problems(tensors, model_config)
    missing = _missing_lm_head(tensors, model_config)
    if missing is not None and not config.pretrain.trains:
        problems.append(NO_LM_HEAD.format(base=folder, name=missing))
    return problems


def _shape_problems(tensors: dict[str, StoredTensor], model_config: dict[str, Any]) -> list[str]:
    """Compares the embeddings with the configuration. Loading compares all other shapes."""
    named = [(name, tensor) for name, tensor in tensors.items() if name.endswith(EMBEDDINGS)]
    size = vocabulary_size(model_config)
    if len(named) != 1 or size is None or "quantization_config" in model_config:
        return []
    ((name, tensor),) = named
    text_config = model_config.get("text_config") or model_config
    widths = [text_config[key] for key in WIDTHS if isinstance(text_config.get(key), int)]
    if tensor.shape[:1] == (size,) and (not widths or tensor.shape[1:] in [(width,) for width in widths]):
        return []
    return [
        f"model.base: {tensor.file}: {name} has the shape {shown(tensor.shape)}, but config.json asks for "
        f"{shown((size, *(widths[:1] or tensor.shape[1:])))}; they do not belong together, download both again"
    ]


def _missing_lm_head(tensors: dict[str, StoredTensor], model_config: dict[str, Any]) -> str | None:
    """Returns the name of the LM head's weights if they are missing, as far as the configuration alone tells their names."""
    names = LM_HEADS.get(str(model_config.get("model_type")), ())
    if (
        not names
        and model_config.get("tie_word_embeddings") is False
        and any(n.endswith(EMBEDDINGS[0]) for n in tensors)
    ):
        names = ("lm_head.",)
    if not names or any(name.startswith(names) or name.partition(".")[2].startswith(names) for name in tensors):
        return None
    return f"{names[0]}*"


def _tokenizer_problems(folder: Path, model_config: dict[str, Any]) -> list[str]:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return [f"model.base: {folder} has no tokenizer ({', '.join(TOKENIZER_FILES)})"]
    problems = []
    settings = _json_object(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") in PLAIN_TOKENIZERS:
        named = _json_object(folder / "special_tokens_map.json") | settings
        if not any(named.get(name) for name in ("eos_token", "sep_token", "bos_token")):
            problems.append(f"model.base: {NO_ENDS.format(base=folder)}")
        if is_masked_type(model_config) and not named.get("mask_token"):
            problems.append(NO_MASK)
    size = vocabulary_size(model_config)
    if size is not None and (folder / "tokenizer.json").is_file():
        token, largest = _largest_id(folder / "tokenizer.json")
        if largest >= size:
            problems.append(f"model.base: {TOO_LARGE_ID.format(base=folder, token=token, id=largest, size=size)}")
    return problems


def vocabulary_size(model_config: dict[str, Any]) -> int | None:
    """Returns the number of embeddings that a model's config.json names; None if it does not."""
    size = (model_config.get("text_config") or model_config).get("vocab_size")
    return size if isinstance(size, int) else None


def _largest_id(file: Path) -> tuple[str, int]:
    """Returns the token with the largest id, and -1 if the file cannot be read; `prepare` then gives the reason."""
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception:  # the library raises plain exceptions
        return "", -1
    return max(vocabulary.items(), key=lambda entry: entry[1], default=("", -1))


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
