"""Digests of mixtune's own code: results of other code are not taken from a cache or a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]

TRAINING = (
    "pretrain",
    "finetune",
    "mixed",
    "shared/artifacts.py",
    "shared/config.py",
    "shared/checkpoints",
    "shared/data",
    "shared/model",
    "shared/training",
)
"""What the result of a training depends on: files and packages below `components/`. Part of a checkpoint's key."""
CACHED_STEPS = ("prepare", "pretrain", "finetune", "mixed", "evaluate", "shared")
"""What a cached step executes. Part of the key of the local cache; a change of `compare` retrains nothing."""
_SUFFIXES = frozenset({".py", ".j2"})


def code_files(parts: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Returns all source files and templates in some files and packages, packages inside packages too.

    Raises:
        FileNotFoundError: where a part does not exist, such as one that was renamed.
    """
    files: set[Path] = set()
    for part in parts:
        path = root / part
        if not path.exists():
            raise FileNotFoundError(f"{path} is listed in {Path(__file__).name} and does not exist")
        files |= {path} if path.is_file() else {file for file in path.rglob("*") if file.suffix in _SUFFIXES}
    return sorted(files)


def code_digest(parts: Iterable[str], root: Path = ROOT) -> str:
    """Returns the SHA-256 of the names and contents of `code_files`."""
    digest = hashlib.sha256()
    for file in code_files(parts, root):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
