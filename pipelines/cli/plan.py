"""`mixtune plan`: writes the part of the configuration that each step takes, for `mixtune step`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtune.components.checks import find_problems
from mixtune.components.plan.step import cut_into_parts, part_texts
from mixtune.components.shared.errors import RefusedError
from mixtune.components.shared.tracking.mlflow_store import store_from_environment

from ..configuration import read_config

CANDIDATES = "candidates"
"""Folder of the candidates, one file for each."""
_FIRST = "prepare_pretrain.json"
"""A file by which a folder that the command wrote is known."""


def plan_and_write(config_file: Path | None, overrides: Sequence[str], output: Path) -> None:
    """Checks a configuration as `plan` does, and writes each step's part of it and each candidate.

    Args:
        output: folder to write to.

    Raises:
        RefusedError: if there are problems, or if the folder contains anything but such parts; names all problems.
        UnreachableError: if the champion is in the MLflow registry, which does not answer.
    """
    config = read_config(config_file, overrides, find_problems)
    cut = cut_into_parts(config, _reach, print)
    texts = {f"{name}.json": text for name, text in part_texts(cut).items()}
    texts |= {f"{CANDIDATES}/{candidate.id}.json": candidate.to_json() for candidate in cut.candidates}
    try:
        if output.exists() and not (output / _FIRST).is_file() and (not output.is_dir() or any(output.iterdir())):
            raise RefusedError(f"--output: {output} was not written by `mixtune plan`; choose another folder")
        (output / CANDIDATES).mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (output / name).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RefusedError(f"--output: {output} cannot be written ({error.strerror or error})") from None
    print(f"wrote {len(texts)} files to {output}: {', '.join(texts)}")


def _reach() -> Any:
    """Returns a client of MLflow; None if no tracking address is set."""
    store = store_from_environment()
    if store is None:
        return None
    store.look()
    return store.client
