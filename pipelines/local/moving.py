"""Follows an output folder that was moved or copied: the absolute paths in its records get the new place."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from mixtune.components.shared.artifacts import read_json, write_json
from mixtune.components.shared.errors import RefusedError

_RECORDS = (
    ".mixtune/last_run.json",
    ".mixtune/cache/*/*.json",
    ".mixtune/outcomes/*/*.json",
    ".mixtune/undelivered/*.jsonl",
    ".mixtune/artifacts/**/evaluation.json",
    ".mixtune/artifacts/**/models.json",
    "report/models.json",
    "history/*/report/models.json",
    "mlflow/artifacts/**/MLmodel",
)
"""Files that contain absolute paths of the output folder."""


def marker_of(output: Path) -> Path:
    """Returns the file that makes a folder the output folder of a run, and that contains its path."""
    return output / ".mixtune" / "folder.json"


def was_moved(output: Path) -> bool:
    """Tells whether a folder is not where its last run was."""
    known = read_json(marker_of(output), "the output folder of a mixtune run").get("path")
    return known is not None and known != str(output.absolute())


def follow(output: Path) -> None:
    """Rewrites the paths in a folder that was moved, and records where it is. The caller holds the folder's lock.

    The path is recorded last, so that an interrupted call is repeated.

    Raises:
        RefusedError: if MLflow's store is in use.
    """
    marker = marker_of(output)
    known = read_json(marker, "the output folder of a mixtune run")
    if was_moved(output):
        change = _replacing(known["path"], str(output.absolute()))
        for pattern in _RECORDS:
            for file in output.glob(pattern):
                _rewrite(file, change)
        _rewrite_store(output / "mlflow" / "mlflow.db", change)
    write_json(marker, {**known, "path": str(output.absolute())})


def _replacing(before: str, now: str) -> Callable[[str], str]:
    """Returns a function that replaces a path in a text, also in JSON, and in JSON inside of JSON."""
    paths: dict[str, str] = {}
    for _ in range(3):
        paths.setdefault(before, now)
        before, now = json.dumps(before)[1:-1], json.dumps(now)[1:-1]
    pattern = re.compile(rf'(?<![\w.-])(?:{"|".join(map(re.escape, paths))})(?=[/"\\]|$)')
    return lambda text: pattern.sub(lambda found: paths[found[0]], text)


def _rewrite(file: Path, change: Callable[[str], str]) -> None:
    text = file.read_text(encoding="utf-8")
    changed = change(text)
    if changed == text:
        return
    aside, times = file.with_name(file.name + ".part"), file.stat()
    aside.write_text(changed, encoding="utf-8")
    os.utime(aside, ns=(times.st_atime_ns, times.st_mtime_ns))  # records are read in the order of their times
    aside.replace(file)


def _rewrite_store(file: Path, change: Callable[[str], str]) -> None:
    """Rewrites all texts of MLflow's SQLite store, whatever its version calls the columns."""
    if not file.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as store, store:
            store.create_function("changed", 1, change, deterministic=True)
            for (table,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for _, column, kind, *_ in store.execute(f'PRAGMA table_info("{table}")').fetchall():
                    if kind.upper().startswith(("VARCHAR", "TEXT")):
                        store.execute(
                            f'UPDATE "{table}" SET "{column}" = changed("{column}") '
                            f'WHERE typeof("{column}") = \'text\' AND changed("{column}") != "{column}"'
                        )
    except sqlite3.Error as error:
        raise RefusedError(f"{file}: cannot be written ({error}); end what uses it and run again") from None
