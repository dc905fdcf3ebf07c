"""Paths in a configuration that only this machine has: they are refused for a cluster, or their data is uploaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtune.components.config import Config, load
from mixtune.components.shared.config import EMBEDDED
from mixtune.components.shared.data.sources import local_files, named_sources
from mixtune.components.shared.errors import RefusedError, UnreachableError, first_line

from ..configuration import read_config
from ..placement import CHECKPOINT_FOLDER

_MODELS = {
    "model.base": "give a name on the Hugging Face hub",
    "evaluate.champion": "give a model in the MLflow registry, models:/name@alias",
    "evaluate.lm_eval.tasks_folder": "put the folder into the image of evaluate and give its path there",
}
"""Options that can be a folder, and what pods can read instead."""


def read_for_cluster(path: Path | None, overrides: Sequence[str] = (), upload_to: str | None = None) -> Config:
    """Reads a configuration for a cluster.

    Args:
        path: configuration file; None reads the embedded default.
        overrides: overrides of the form `a.b=c`.
        upload_to: URL of a folder in an object store, to which data that only this machine has is uploaded.

    Raises:
        RefusedError: if the configuration has problems, or names paths that pods cannot see.
        UnreachableError: if the object store cannot be written.
    """
    config = read_config(path, overrides)
    if upload_to is not None:
        config = _upload(config, upload_to)
    refuse_local_paths(config)
    return config


def refuse_local_paths(config: Config) -> None:
    """Refuses paths that exist on this machine.

    A path that does not exist here can be one in the image or in a volume. The claim for checkpoints is such a volume.

    Raises:
        RefusedError: if there are such paths; names all of them.
    """
    problems = [
        f"{option}: {path} is on this machine, where pods cannot see it; "
        f"{_MODELS.get(option, 'give a URL that they can read, or upload it with --upload-data')}"
        for option, path in _local(config)
    ]
    if problems:
        raise RefusedError(*problems)


def _local(config: Config) -> Iterator[tuple[str, str]]:
    import fsspec

    here = fsspec.filesystem("file")
    values = config.model_dump(mode="json")
    in_claim = f"{CHECKPOINT_FOLDER}/" if config.placement.checkpoint_claim else None
    for option in (*_data(config), *_MODELS):
        path = _get(values, option)
        if path is None or path == EMBEDDED or "://" in path or (in_claim and path.startswith(in_claim)):
            continue
        if Path(path).exists() or (option.startswith("data.") and here.glob(path)):
            yield option, path


def _data(config: Config) -> list[str]:
    """Returns the full names of all options that name data."""
    return [named.option for stream in (config.data.pretrain, config.data.finetune) for named in named_sources(stream)]


def _get(values: Any, option: str) -> str | None:
    for name in option.split("."):
        values = values[int(name) if isinstance(values, list) else name]
    return values if isinstance(values, str) else None


def _set(values: Any, option: str, value: str) -> None:
    *parents, last = option.split(".")
    for name in parents:
        values = values[int(name) if isinstance(values, list) else name]
    values[last] = value


def _upload(config: Config, url: str) -> Config:
    """Uploads local data, each source to a folder that is named by its content. Returns the configuration with the URLs."""
    values = config.model_dump(mode="json")
    for option, path in _local(config):
        if not option.startswith("data."):
            continue
        files = local_files(path, option)
        root = Path(path) if Path(path).is_dir() else Path(os.path.commonpath([file.parent for file in files]))
        names = {file: file.relative_to(root).as_posix() for file in files}
        target = f"{url.rstrip('/')}/{_digest(names)}"
        _put(names, target, option)
        _set(values, option, f"{target}/{names[files[0]]}" if Path(path).is_file() else target)
        print(f"{option}: {len(files):,} {'file' if len(files) == 1 else 'files'} uploaded to {target}")
    return load(values)


def _digest(names: Mapping[Path, str]) -> str:
    """Returns 16 hexadecimal digits that identify names and content of files."""
    digest = hashlib.sha256()
    for file, name in names.items():
        with file.open("rb") as opened:
            digest.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _put(names: Mapping[Path, str], target: str, option: str) -> None:
    """Copies files to a folder of the object store, except those that are there."""
    from fsspec.core import url_to_fs

    try:
        store, folder = url_to_fs(target)
        for file, name in names.items():
            place = f"{folder}/{name}"
            if store.exists(place) and store.size(place) == file.stat().st_size:
                continue
            store.put_file(str(file), place)
    except (ImportError, ValueError) as error:
        raise RefusedError(
            f"--upload-data: {target} cannot be used ({first_line(error)}); give a URL such as s3://bucket/data"
        ) from None
    except Exception as error:  # object stores raise various errors
        raise UnreachableError(
            f"--upload-data: {option} cannot be uploaded to {target} ({first_line(error)}); correct the URL or its credentials"
        ) from None
