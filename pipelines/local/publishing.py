"""Puts the results of a local run into the output folder. Deletes nothing that a person may need.

What a run replaces by something else, and what it no longer has, moves to `history/<run>/`. Files that mixtune did not write
stay where they are; those inside of a replaced folder move with it.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mixtune.components.config import Config
from mixtune.components.shared.artifacts import ModelCard, read_json
from mixtune.components.shared.data.prepared import QUARANTINE, DataManifest
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.outcome import Outcome, load_outcome
from mixtune.components.shared.task_name import TaskName

from ..configuration import to_yaml
from .folder import Run

Writer = Callable[[Path], None]
"""Writes a file or a folder at a path."""


@dataclass(frozen=True)
class Published:
    """What a run put into its output folder.

    Attributes:
        report: content of `report.json`.
        problems: a sentence for each result that could not be published because its path is in use.
        notes: further messages for the user.
    """

    report: dict[str, Any]
    problems: list[str]
    notes: list[str]


@dataclass
class _Folder:
    """An output folder in which results are replaced.

    Attributes:
        output: the output folder.
        history: folder for what is replaced.
        new: folder in which results are completed before they get their name.
        moved: names of what was moved to the history.
    """

    output: Path
    history: Path
    new: Path
    moved: list[str] = field(default_factory=list)

    def put(self, name: str, write: Writer) -> None:
        """Puts a file or folder at a name, and moves what has the name already to the history, unless it is the same."""
        made, target = self.new / name, self.output / name
        made.parent.mkdir(parents=True, exist_ok=True)
        write(made)
        if target.exists() and _is_same(target, made):
            return
        if target.exists():
            self.move_to_history(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        made.rename(target)

    def move_to_history(self, name: str) -> None:
        """Moves a file or folder to the history. It is on the same file system, so this copies nothing."""
        target = self.history / name
        number = 1
        while target.exists() or target.is_symlink():
            number += 1
            target = (self.history / name).with_name(f"{number}-{Path(name).name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.output / name).rename(target)
        self.moved.append(name)


def publish(run: Run, config: Config, compared: Outcome, registered: Outcome | None) -> Published:
    """Publishes report and models in the output folder.

    Args:
        config: configuration of the run; stored with the report.
        compared: record of `compare`, with the locations of all candidates' models.
        registered: record of `register`, the only step that writes an interpolated model.
    """
    comparison = Path(compared.artifacts["comparison"])
    report: dict[str, Any] = read_json(comparison / "report.json", "a comparison made by mixtune")
    models = read_json(comparison / "models.json", "a comparison made by mixtune")
    if registered is not None and report["selected"] not in models:
        models = {**models, report["selected"]: registered.artifacts["model"]}
    writers: dict[str, Writer | None] = {
        name: partial(_copy_model, Path(uri)) if Path(uri).is_dir() else None for name, uri in models.items()
    }
    if config.run.keep_interpolated:
        writers = _interpolated(compared) | writers
    selected = report["selected"] if report["gate"]["passed"] else None
    folder = _Folder(run.output, run.output / "history" / _published_by(run), run.state / "new")
    shutil.rmtree(folder.new, ignore_errors=True)
    try:
        _publish_report(folder, comparison, {"config.yaml": to_yaml(config), "run.json": json.dumps({"id": run.id})})
        problems = _publish_models(folder, writers, selected)
        _publish_predictions(folder, compared)
        _publish_data_reports(folder, run, report)
    finally:
        shutil.rmtree(folder.new, ignore_errors=True)
    earlier = [name.removeprefix("models/") for name in folder.moved if name.startswith("models/")]
    notes = [f"earlier models are kept in {folder.history / 'models'}: {', '.join(earlier)}"] if earlier else []
    return Published(report, problems, notes)


def _published_by(run: Run) -> str:
    """Returns the id of the run whose results are in the output folder."""
    file = run.output / "report" / "run.json"
    with contextlib.suppress(RefusedError, KeyError, TypeError):  # a person may have deleted or changed the file
        return str(read_json(file, "a report of a mixtune run")["id"])
    return f"before-{run.id}"


def _publish_report(folder: _Folder, comparison: Path, texts: dict[str, str]) -> None:
    def write(target: Path) -> None:
        _copy_folder(comparison, target)
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")

    folder.put("report", write)
    earlier = folder.history / "report" / "config.yaml"
    if earlier.is_file():
        shutil.copy2(earlier, folder.history / "config.yaml")


def _evaluations(compared: Outcome) -> list[Path]:
    """Returns the folders of the evaluations that were compared."""
    uris = json.loads(compared.given.get("artifacts", "{}"))
    return [Path(uri) for given in uris.values() for uri in ([given] if isinstance(given, str) else given)]


def _publish_predictions(folder: _Folder, compared: Outcome) -> None:
    """Publishes the predictions of each candidate on the test split, one example a line."""
    found = [file for one in _evaluations(compared) for file in sorted(one.glob("*/test.examples.jsonl"))]
    files = {file.parent.name: file for file in found}
    for candidate, file in files.items():
        folder.put(f"predictions/{candidate}.jsonl", partial(_copy, str(file)))
    before = folder.history / "report" / "report.json"
    rows = read_json(before, "the report of a mixtune run").get("candidates", []) if before.is_file() else []
    for name in (f"predictions/{row['id']}.jsonl" for row in rows if row["id"] not in files):
        if (folder.output / name).is_file():
            folder.move_to_history(name)


def _publish_data_reports(folder: _Folder, run: Run, report: dict[str, Any]) -> None:
    """Publishes the data report of each stream, from the record of the run that prepared the data."""
    for stream, data in report.get("data", {}).items():
        title = str(TaskName("prepare", stream=stream))
        for records in sorted(run.outcomes.parent.iterdir(), reverse=True):
            made = load_outcome(records, title)
            if made is None or made.kind != "done":
                continue
            page = Path(made.artifacts["report"])
            if page.is_file() and DataManifest.load(made.artifacts["heldout"]).digest == data["digest"]:
                folder.put(f"data/{stream}.html", partial(_copy, str(page)))
                quarantine, name = Path(made.artifacts["train"]) / QUARANTINE, f"data/{stream}-quarantine.jsonl"
                if quarantine.is_file():
                    folder.put(name, partial(_copy, str(quarantine)))
                elif (folder.output / name).is_file():
                    folder.move_to_history(name)
                break


def _interpolated(compared: Outcome) -> dict[str, Writer | None]:
    """Returns what writes each interpolated candidate."""
    from mixtune.components.register.step import write_interpolated

    found: dict[str, Writer | None] = {}
    for evaluation in _evaluations(compared):
        for one in read_json(evaluation / "evaluation.json", "an evaluation made by mixtune")["candidates"]:
            if one["kind"] == "interpolated":
                ends = one["model_uri"], one["other_uri"]
                found[one["id"]] = partial(write_interpolated, one["alpha"], one["id"], *ends)
    return found


def _publish_models(folder: _Folder, models: dict[str, Writer | None], selected: str | None) -> list[str]:
    target = folder.output / "models"
    target.mkdir(exist_ok=True)
    link = target / "selected"
    if link.is_symlink():
        link.unlink()
    for one in sorted(target.iterdir()):
        if one.name not in models and _is_published(one):
            folder.move_to_history(f"models/{one.name}")
    taken = []
    for candidate, write in models.items():
        place = target / candidate
        if (place.exists() or place.is_symlink()) and not _is_published(place):
            taken.append(place)
        elif write is not None:
            folder.put(f"models/{candidate}", write)
    if link.exists():
        taken.append(link)
    elif selected is not None and _is_published(target / selected):
        link.symlink_to(selected)
    return [f"{place} was not created by mixtune; move it and run again" for place in taken]


def _copy_model(source: Path, target: Path) -> None:
    _copy_folder(source, target)
    _link_weights(target)


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


def _is_same(one: Path, other: Path) -> bool:
    """Tells whether two files or folders have the same content. Hard links of one file are not read."""
    if one.is_symlink() or other.is_symlink():
        return one.is_symlink() and other.is_symlink() and one.readlink() == other.readlink()
    if one.is_dir() and other.is_dir():
        names = {file.name for file in one.iterdir()}
        same_names = names == {file.name for file in other.iterdir()}
        return same_names and all(_is_same(one / name, other / name) for name in names)
    return one.is_file() and other.is_file() and (one.samefile(other) or filecmp.cmp(one, other, shallow=False))


def _copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_copy)


def _copy(source: str, target: str | Path) -> None:
    """Copies a file. Weights, which are large, are hard-linked if the file system supports it."""
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
