"""Copies the report and the models of a local run to the output folder, without overwriting the user's files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from mixtune.components.config import Config
from mixtune.components.shared.artifacts import ModelCard, read_json
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.outcome import Outcome

from ..configuration import to_yaml
from .folder import Run


def publish(
    run: Run, config: Config, compared: Outcome, registered: Outcome | None
) -> tuple[dict[str, Any], list[str]]:
    """Publishes report and models in the output folder, without overwriting the user's files.

    Args:
        config: configuration of the run; stored with the report.
        compared: record of `compare`, with the locations of all candidates' models.
        registered: record of `register`, the only step that writes interpolated models.

    Returns:
        The report, and a sentence for each model that could not be published because its path is in use.
    """
    comparison = Path(compared.artifacts["comparison"])
    report: dict[str, Any] = read_json(comparison / "report.json", "a comparison made by mixtune")
    _replace(
        run.output / "report", comparison, {"config.yaml": to_yaml(config), "run.json": json.dumps({"id": run.id})}
    )
    models = read_json(comparison / "models.json", "a comparison made by mixtune")
    if registered is not None and report["selected"] not in models:
        models = {**models, report["selected"]: registered.artifacts["model"]}
    selected = report["selected"] if report["gate"]["passed"] else None
    return report, _publish_models(run.output / "models", models, selected)


def _publish_models(target: Path, models: dict[str, str], selected: str | None) -> list[str]:
    target.mkdir(exist_ok=True)
    link = target / "selected"
    if link.is_symlink():
        link.unlink()
    for folder in target.iterdir():
        if folder.name not in models and _is_published(folder):
            shutil.rmtree(folder)
    taken = []
    for candidate, uri in models.items():
        place = target / candidate
        if (place.exists() or place.is_symlink()) and not _is_published(place):
            taken.append(place)
        elif Path(uri).is_dir():
            _replace(place, Path(uri))
            _link_weights(place)
    if link.exists():
        taken.append(link)
    elif selected is not None and _is_published(target / selected):
        link.symlink_to(selected)
    return [f"{place} was not created by mixtune; move it and run again" for place in taken]


def _link_weights(folder: Path) -> None:
    """Links the weights of an unchanged base model, which are not copied, so that plain transformers loads the folder."""
    card = ModelCard.load(folder)
    if card.weights is None:
        return
    source = Path(card.weights)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        try:
            source = Path(snapshot_download(card.weights, revision=card.revision, local_files_only=True))
        except Exception:  # the hub's cache may be deleted; the card still names the model
            return
    for file in source.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.absolute())


def _is_published(folder: Path) -> bool:
    """Tells whether an earlier run published a candidate in the folder. Copies under other names belong to the user."""
    if folder.is_symlink() or not (folder / "mixtune.json").is_file():
        return False
    try:
        return ModelCard.load(folder).id == folder.name
    except (RefusedError, ValueError):
        return False


def _replace(target: Path, source: Path, texts: dict[str, str] | None = None) -> None:
    """Replaces a folder with a copy of another and adds text files."""
    aside = target.with_name(target.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside, copy_function=_copy)
    for name, text in (texts or {}).items():
        (aside / name).write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _copy(source: str, target: str) -> None:
    """Copies a file. Weights, which are large, are hard-linked if the file system supports it."""
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)


def keep_history(output: Path) -> None:
    """Archives the last report and its configuration before another report replaces it."""
    report = output / "report"
    if not (report / "run.json").is_file():
        return
    kept = output / "history" / read_json(report / "run.json", "a report of a mixtune run")["id"]
    if not (kept / "report").exists():
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy2(report / "config.yaml", kept / "config.yaml")
        _replace(kept / "report", report)
