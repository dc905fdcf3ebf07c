"""New stores of MLflow in a SQLite file."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from mixtune.components.shared.tracking.connection import connect


def new_store(file: Path) -> str:
    """Makes a store that MLflow would make and returns its address. A store that exists is left as it is.

    MLflow makes a store by its migrations since the first version, which takes a second of computing, and many more where the
    disk is slow. Here it does so once; the others are copies.
    """
    if not file.exists():
        template = Path(tempfile.gettempdir()) / f"mixtune-tests-mlflow-{version('mlflow')}.db"
        with FileLock(f"{template}.lock"):
            if not template.exists():
                with tempfile.TemporaryDirectory() as folder:
                    made = Path(folder) / template.name
                    connect(f"sqlite:///{made}")
                    shutil.copy(made, f"{template}.part")
                Path(f"{template}.part").rename(template)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(template, file)
    return f"sqlite:///{file}"
