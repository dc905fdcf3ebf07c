"""Checks before any heavy work: the base model's folder and the sources. They take about a second and need no torch."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from .config import Config, Fingerprints
from .evaluate.harness_tasks import NOT_INSTALLED, installed, known_tasks
from .shared.config import EMBEDDED, SCRATCH
from .shared.data.sources import check_source, fingerprint
from .shared.errors import RefusedError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def find_problems(config: Config) -> list[str]:
    """Returns the problems of a valid configuration with its files, models and sources, one sentence for each."""
    problems = _model_problems(config.model.base, config.model.max_length)
    problems += check_source(config.data.pretrain)
    problems += check_source(config.data.finetune)
    problems += _champion_problems(config.evaluate.champion)
    problems += _lm_eval_problems(config)
    return problems


def missing_here(config: Config) -> list[str]:
    """Returns required packages that are missing on this machine. On a cluster this does not matter: steps run in images."""
    return [NOT_INSTALLED] if config.evaluate.lm_eval.tasks and not installed() else []


def fingerprints(config: Config) -> Fingerprints:
    """Identifies the content of the sources and models that the configuration names."""
    return Fingerprints(
        pretrain=fingerprint(config.data.pretrain),
        finetune=fingerprint(config.data.finetune),
        base=_model_fingerprint(config),
        champion=_champion_fingerprint(config.evaluate.champion),
        tasks_folder=_tasks_fingerprint(config),
    )


REGISTRY = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
"""A model in the MLflow registry, by alias or by version."""


def _champion_problems(champion: str | None) -> list[str]:
    if champion is None or REGISTRY.fullmatch(champion):
        return []
    if champion.startswith("models:"):
        return [f"evaluate.champion: {champion} must look like models:/name@alias or models:/name/3"]
    if not (Path(champion) / "mixtune.json").is_file():
        return [f"evaluate.champion: {champion} is no folder with a model made by mixtune (it has no mixtune.json)"]
    return []


def _champion_fingerprint(champion: str | None) -> str:
    """Returns the digest of a folder. For a version in the registry the name suffices, since versions never change."""
    if champion is None or champion.startswith("models:"):
        return champion or ""
    return _folder_digest(Path(champion))


def _lm_eval_problems(config: Config) -> list[str]:
    """Only the harness knows its tasks; if it is not installed here, `evaluate` checks them."""
    lm_eval = config.evaluate.lm_eval
    if not lm_eval.tasks:
        return []
    problems = []
    if _is_masked(config):
        problems.append(
            "evaluate.lm_eval.tasks: the model is a masked language model, for which lm-evaluation-harness has no tasks; leave "
            "them out"
        )
    if lm_eval.tasks_folder is not None and not Path(lm_eval.tasks_folder).is_dir():
        return [*problems, f"evaluate.lm_eval.tasks_folder: there is no folder {lm_eval.tasks_folder}"]
    if installed():
        try:
            known_tasks(lm_eval)
        except RefusedError as error:
            problems += error.problems
    return problems


def _is_masked(config: Config) -> bool:
    """Returns whether the objective is masked LM, as far as this can be determined without loading the model."""
    if config.model.objective is not None:
        return config.model.objective == "masked_lm"
    try:
        base_config = json.loads((Path(config.model.base) / "config.json").read_text(encoding="utf-8"))
        return any(str(name).endswith("ForMaskedLM") for name in base_config.get("architectures") or [])
    except (OSError, ValueError, AttributeError):
        return False


def _tasks_fingerprint(config: Config) -> str:
    """Returns the digest of the user's own task files and the data files next to them."""
    lm_eval = config.evaluate.lm_eval
    if not lm_eval.tasks or lm_eval.tasks_folder is None:
        return ""
    folder, digest = Path(lm_eval.tasks_folder), hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            _add(digest, file)
    return digest.hexdigest()


def _looks_local(base: str) -> bool:
    return base.startswith((".", "/")) or Path(base).exists()


def _model_problems(base: str, max_length: int) -> list[str]:
    if base == SCRATCH:
        return []
    if base == EMBEDDED:
        return ["model.base: embedded is a data source, not a model; use scratch, a folder or a hub name"]
    if not _looks_local(base):
        if _is_hub_name(base):
            return []
        return [f"model.base: {base} is neither scratch, nor a folder, nor a hub name such as owner/name"]
    folder = Path(base)
    if not folder.is_dir():
        return [f"model.base: there is no folder {base}"]
    problems = []
    config_file = folder / "config.json"
    if not config_file.is_file():
        return [f"model.base: {base} has no config.json, so it is no model in Hugging Face format"]
    try:
        model_config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(model_config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        return [f"model.base: {config_file} cannot be read as JSON ({error})"]
    positions = model_config.get("n_positions") or model_config.get("max_position_embeddings")
    if isinstance(positions, int) and positions < max_length:
        problems.append(f"model.max_length: is {max_length}, but the model in {base} has only {positions} positions")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        hint = "; its weights are in .bin files, which can run code when loaded: convert them" if pickled else ""
        problems.append(f"model.base: {base} has no .safetensors file{hint}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        problems.append(f"model.base: {base} has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    elif (folder / "tokenizer.json").is_file() and isinstance(model_config.get("vocab_size"), int):
        tokenizer_size = _tokenizer_size(folder / "tokenizer.json")
        if tokenizer_size is not None and tokenizer_size > model_config["vocab_size"]:
            problems.append(
                f"model.base: the tokenizer in {base} has {tokenizer_size} entries, but the model's vocabulary has only "
                f"{model_config['vocab_size']}; they do not belong together"
            )
    return problems


def _hub_commit(base: str, revision: str | None) -> str:
    """Returns the commit of a branch or tag, which can change; the name itself if the hub cannot be reached."""
    if revision and len(revision) == 40:
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(base, revision=revision, timeout=5).sha or "main"
    except Exception:  # the steps that load from the hub report its errors in full
        return revision or "main"


def _tokenizer_size(file: Path) -> int | None:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file)).get_vocab_size(with_added_tokens=True)
    except Exception:
        return None


def _is_hub_name(base: str) -> bool:
    parts = base.split("/")
    return len(parts) <= 2 and all(part and all(c.isalnum() or c in "-_." for c in part) for part in parts)


def _model_fingerprint(config: Config) -> str:
    base = config.model.base
    if base == SCRATCH:
        return SCRATCH
    if not _looks_local(base):
        return f"{base}@{_hub_commit(base, config.model.revision)}"
    return _folder_digest(Path(base))


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in {".json", ".safetensors", ".model", ".txt"}:
            digest.update(file.name.encode())
            _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as content:
        hashlib.file_digest(content, lambda: digest)
