"""Recognises a run that would only repeat the last one, so that the command can show the results that are there.

This needs the same configuration, the same content of all sources and models, the same code and versions of the packages that
results depend on, and results and an MLflow store in the output folder that nobody has changed. With a tracking server
elsewhere, every run goes on record there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixtune.components.checks import fingerprints
from mixtune.components.config import Config
from mixtune.components.shared.artifacts import read_json, write_json
from mixtune.components.shared.code_digest import ROOT, code_digest
from mixtune.components.shared.errors import MixtuneError

from ..ended import Ended

_RESULTS = ("report", "models", "predictions", "data", "mlflow")
_PASSING = ("-wal", "-shm", "-journal")
"""Ends of the names of SQLite's temporary files."""


class LastResults:
    """The results of the last run in an output folder, and what they were made from.

    Args:
        config: configuration of the run that is about to start.
        code: digest of the code of the cached steps and of the packages that they use.
        output: the output folder; the caller holds its lock.
    """

    def __init__(self, config: Config, code: str, output: Path) -> None:
        self._output = output
        self._file = _record(output)
        parts = sorted(path.name for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
        self._settings = _digest([config.model_dump(mode="json"), code, code_digest(parts)])
        # In a thread, since base models are large. The run reads the same files at the same time.
        executor = ThreadPoolExecutor(max_workers=1)
        self._content: Future[str] = executor.submit(lambda: _digest(vars(fingerprints(config))))
        executor.shutdown(wait=False)

    def repeated(self) -> Ended | None:
        """Returns how the last run ended, if the next one would be the same; else None."""
        try:
            last = read_json(self._file, "the record of a run's results") if self._file.is_file() else {}
            if last.get("settings") != self._settings or last.get("files") != self._files():
                return None
            if last.get("content") != self._content.result():
                return None
            report = read_json(self._output / "report" / "report.json", "a report of mixtune")
            return Ended(**last["ended"], report=report)
        except (MixtuneError, OSError, ValueError, TypeError, KeyError):
            return None

    def remember(self, ended: Ended, notes: list[str]) -> None:
        """Records a run that has published its results, with the messages that are still true if it is repeated."""
        with contextlib.suppress(MixtuneError, OSError):
            made_from = {"settings": self._settings, "content": self._content.result(), "files": self._files()}
            how = {name: getattr(ended, name) for name in ("run_id", "state", "outcome", "verdict")}
            write_json(self._file, {**made_from, "ended": {**how, "notes": notes}})

    def _files(self) -> str:
        """Returns a digest of the names, sizes and times of all published files and of the MLflow store."""
        found = []
        for name in _RESULTS:
            for path in sorted((self._output / name).rglob("*")):
                if not path.name.endswith(_PASSING) and not path.is_dir():
                    status = path.lstat()
                    found.append([path.relative_to(self._output).as_posix(), status.st_size, status.st_mtime_ns])
        return _digest(found)


def forget_results(output: Path) -> None:
    """Deletes the record of the last run's results, so that the next run is a new one."""
    _record(output).unlink(missing_ok=True)


def _record(output: Path) -> Path:
    return output / ".mixtune" / "results.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
