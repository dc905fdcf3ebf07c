"""Data in a volume of a cluster: `pvc://claim/path`, which the pipeline mounts into the steps that read it."""

from __future__ import annotations

import os
import re
from pathlib import Path

CLAIM = "pvc://"
CLAIMS_DIR = "MIXTUNE_CLAIMS_DIR"
"""Environment variable with the folder in which the claims are mounted, each under its name."""
NO_CLAIM = f"must look like {CLAIM}claim/path, where claim is the name of a PersistentVolumeClaim"
NOT_MOUNTED = (
    "is in a volume of a cluster, which only a run on the cluster can read, and only if the configuration names it when the "
    "pipeline is compiled; here, give a path (check --cluster checks the rest)"
)
_NAME = re.compile(r"pvc://([a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?)/(.+)")


def claim_of(source: str) -> str | None:
    """Returns the claim that a source names; None if it names none."""
    found = _NAME.fullmatch(source)
    return found[1] if found else None


def mounted(source: str) -> str:
    """Returns the path of a source in a claim that is mounted here; other sources as they are."""
    found, folder = _NAME.fullmatch(source), os.environ.get(CLAIMS_DIR)
    if found is None or not folder or not (Path(folder) / found[1]).is_dir():
        return source
    return str(Path(folder, *found.groups()))
