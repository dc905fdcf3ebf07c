"""Digests of mixtune's own code. They invalidate cached results and checkpoints that other code produced."""

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
    "shared/section.py",
    "shared/serving",
    "shared/task_kinds.py",
    "shared/third_party/accelerate.py",
    "shared/third_party/torch.py",
    "shared/third_party/transformers.py",
    "shared/training",
)
"""Files and packages below `components/` that the result of a training depends on. Part of a checkpoint's key."""
CACHED_STEPS = ("prepare", "pretrain", "finetune", "mixed", "evaluate", "shared")
"""Packages that a cached step executes. Part of the local cache's key. A change in `compare` retrains nothing."""
_SUFFIXES = frozenset({".py", ".j2"})


def code_files(parts: Iterable[str], root: Path = ROOT) -> list[Path]:
    """Returns all source files and templates of the given files and packages, including subpackages.

    Raises:
        FileNotFoundError: if a part does not exist, for example because it was renamed.
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
