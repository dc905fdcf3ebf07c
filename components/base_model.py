"""Checks of the base model's folder: configuration, tokenizer and the headers of its weight files. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .config import Config
from .shared.config import EMBEDDED, SCRATCH
from .shared.model.tokenizer import NO_ENDS, TOO_LARGE_ID
from .shared.model.weight_files import NO_LM_HEAD, StoredTensor, shown, stored_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that have no special tokens besides those in their files."""
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
        return []
    if base == EMBEDDED:
        return ["model.base: embedded is a data source, not a model; use scratch, a folder or a hub name"]
    if not looks_local(base):
        if _is_hub_name(base):
            return []
        return [f"model.base: {base} is neither scratch, nor a folder, nor a hub name such as owner/name"]
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
        *_length_problems(config, model_config),
        *_weight_problems(config, model_config),
        *_tokenizer_problems(folder, model_config),
    ]


def looks_local(base: str) -> bool:
    """Tells whether the name of a base model is a folder rather than a name on the hub."""
    return base.startswith((".", "/", "~")) or Path(base).exists()


def _is_hub_name(base: str) -> bool:
    parts = base.split("/")
    return len(parts) <= 2 and all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts)


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
        problems.append(NO_LM_HEAD.format(folder, missing))
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
            problems.append(f"model.base: {NO_ENDS.format(folder)}")
    size = vocabulary_size(model_config)
    if size is not None and (folder / "tokenizer.json").is_file():
        token, largest = _largest_id(folder / "tokenizer.json")
        if largest >= size:
            problems.append(f"model.base: {TOO_LARGE_ID.format(folder, token, largest, size)}")
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
