"""Checks before any heavy work: the base model and the sources. They take about a second and need no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .base_model import (
    attention_problems,
    hub_config,
    is_masked_type,
    lacks_chat_template,
    looks_local,
    missing_gpu_here,
    model_problems,
)
from .config import Config, Fingerprints
from .evaluate.harness_tasks import NOT_INSTALLED, installed, known_tasks
from .prepare.config import FinetuneData, PretrainData
from .shared.config import SCRATCH
from .shared.data.chats import NO_TEMPLATE
from .shared.data.sources import check_source, count_records, fingerprint, first_rows, named_sources
from .shared.errors import RefusedError
from .shared.model.quantization import missing_for_4_bits
from .shared.section import known

MIN_CONTROL_DOCUMENTS = 20
"""Fewer documents say little about the forgetting on all text."""


def find_problems(config: Config, gpus: int | None = None) -> list[str]:
    """Returns the problems of a configuration with its files, models and sources, one sentence for each.

    Args:
        config: the configuration. Checks that read an invalid option of it are skipped.
        gpus: GPUs of a training task on a cluster; None in a local run.
    """
    checks: list[Callable[[], Iterable[str]]] = [
        lambda: model_problems(config),
        lambda: [] if gpus is None else attention_problems(config, "where placement.gpus is 0", gpus > 0),
        lambda: [] if gpus is None else _quantization_problems(config, gpus > 0),
        lambda: _template_problems(config.model.chat_template),
        lambda: check_source(config.data.pretrain),
        lambda: check_source(config.data.finetune),
        lambda: _chat_problems(config),
        lambda: _control_problems(config),
        lambda: _champion_problems(config.evaluate.champion),
        lambda: _lm_eval_problems(config),
        lambda: _writing_problems(config),
    ]
    return [problem for check in checks for problem in known(check)]


def _quantization_problems(config: Config, gpu: bool) -> list[str]:
    """Returns what a cluster lacks for weights of 4 bits. Its images, and so their packages, are not known here."""
    if not config.mixed.controls.in_4_bits:
        return []
    return missing_for_4_bits("a cluster with placement.gpus: 0", gpu, packages=False)


def _template_problems(file: str | None) -> list[str]:
    return [] if file is None or Path(file).is_file() else [f"model.chat_template: there is no file {file}"]


def _chat_problems(config: Config) -> list[str]:
    """Returns the streams that hold chats, if nothing can render them."""
    if not lacks_chat_template(config):
        return []
    streams = (config.data.pretrain, config.data.finetune)
    chats = [stream for stream in streams if any(row.chat for row in first_rows(stream, 1))]
    return [NO_TEMPLATE.format(section=stream.section, base=config.model.base) for stream in chats]


def count_examples(stream: PretrainData | FinetuneData) -> int | None:
    """Counts the records of all sources; None if that is not known."""
    counts = [count_records(one.path, one.option) for one in named_sources(stream) if one.part == "source"]
    return None if None in counts else sum(count or 0 for count in counts)


def few_control_documents(config: Config) -> str | None:
    """Says that forgetting budgets will be kept on few documents. None if there are enough, or if that is not known."""
    count = _control_documents(config)
    if config.mixed.budgets_option is None or count is None or count >= MIN_CONTROL_DOCUMENTS:
        return None
    return (
        f"data.pretrain.control_fraction: forgetting will be measured on about {count:,} documents, and a forgetting "
        f"budget is kept loosely on fewer than {MIN_CONTROL_DOCUMENTS}; raise it, or give more pretraining text"
    )


def _control_documents(config: Config) -> int | None:
    """Estimates the number of documents in the control split; None if it is not known, or if nothing needs it."""
    text = config.data.pretrain
    if config.mixed.budgets_option is None and config.watch.every_steps is None:
        return None
    if text.control_fraction == 0:
        return 0
    whole = count_examples(text)
    if whole is None:
        return None
    held_out = (0.0 if text.dev_source else text.dev_fraction) + (0.0 if text.test_source else text.test_fraction)
    return int(text.control_fraction * (1 - held_out) * min(whole, text.max_documents or whole))


def _control_problems(config: Config) -> list[str]:
    if _control_documents(config) != 0:
        return []
    return [
        f"data.pretrain.control_fraction: is {config.data.pretrain.control_fraction:g}, which leaves no document to measure "
        f"forgetting on; {config.mixed.budgets_option or 'watch.every_steps'} needs some: "
        "raise it, or give more pretraining text"
    ]


def missing_here(config: Config) -> list[str]:
    """Returns what a run on this machine lacks: packages, a GPU. On a cluster this does not matter: steps run in images."""
    packages = known(lambda: [NOT_INSTALLED] if config.evaluate.lm_eval.tasks and not installed() else [])
    return packages + known(lambda: missing_gpu_here(config))


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
    problems = []
    if config.evaluate.capabilities and is_masked(config):
        problems.append(
            "evaluate.capabilities: the model is a masked language model, which answers no questions; leave it out"
        )
    if not lm_eval.tasks:
        return problems
    if is_masked(config):
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


def _writing_problems(config: Config) -> list[str]:
    """Returns the candidates whose start model would have to write text, if it cannot."""
    if not config.mixed.controls.generated_lambdas or not is_masked(config):
        return []
    return [
        "mixed.controls.generated_lambdas: the model is a masked language model, which generates no text; leave them out"
    ]


def is_masked(config: Config) -> bool:
    """Returns whether the objective is masked LM, as far as this can be determined without loading the model."""
    if config.model.objective is not None:
        return config.model.objective == "masked_lm"
    if config.model.base == SCRATCH:
        return False
    if not looks_local(config.model.base):
        return is_masked_type(hub_config(config.model.base, config.model.revision)[0] or {})
    try:
        return is_masked_type(json.loads((Path(config.model.base) / "config.json").read_text(encoding="utf-8")))
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


def _hub_commit(base: str, revision: str | None) -> str:
    """Returns the commit of a branch or tag, which can change; the name itself if the hub cannot be reached."""
    if revision and len(revision) == 40:
        return revision
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(base, revision=revision, timeout=5).sha or "main"
    except Exception:  # the steps that load from the hub report its errors in full
        return revision or "main"


def _model_fingerprint(config: Config) -> str:
    base, template = config.model.base, config.model.chat_template
    of_template = f" {hashlib.sha256(Path(template).read_bytes()).hexdigest()}" if template is not None else ""
    if base == SCRATCH:
        return f"{SCRATCH}{of_template}"
    if not looks_local(base):
        return f"{base}@{_hub_commit(base, config.model.revision)}{of_template}"
    return f"{_folder_digest(Path(base))}{of_template}"


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in {".json", ".safetensors", ".model", ".txt", ".jinja"}:
            digest.update(file.name.encode())
            _add(digest, file)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as content:
        hashlib.file_digest(content, lambda: digest)
