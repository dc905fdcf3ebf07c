"""`mixtune sync`: delivers records of local runs that MLflow has not received."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from mixtune.components.shared.errors import RefusedError, UnreachableError
from mixtune.components.shared.outcome import EXIT_STATUS
from mixtune.components.shared.tracking.journal import in_words, undelivered

from .folder import journal_folder
from .last_run import close_killed_run, was_killed
from .moving import follow, marker_of, was_moved

RUNS = Path("runs")


def sync_and_show(folder: Path | None) -> int:
    """Delivers the pending records of one run, or of every run below `runs`, and reports what was delivered and what was not.

    Returns:
        Exit status: 0; 4 if a server still does not answer; 1 if a server rejects records.

    Raises:
        RefusedError: if the folder contains no mixtune run.
    """
    if folder is not None and not marker_of(folder).is_file():
        raise RefusedError(f"{folder}: is not the output folder of a mixtune run; give one, such as runs/<name>")
    folders = (
        [folder] if folder is not None else sorted(one.parent.parent for one in RUNS.glob("*/.mixtune/folder.json"))
    )
    left = [one for one in folders if was_moved(one) or was_killed(one) or undelivered(journal_folder(one)).counts]
    if not left:
        where = str(folder) if folder else f"the runs below {RUNS}" if folders else f"{RUNS} (there is no run)"
        print(f"no records are left to deliver in {where}")
    return max((_sync_one(one) for one in left), default=0)


def _sync_one(folder: Path) -> int:
    lock = FileLock(folder / ".mixtune" / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        print(
            f"{folder}: a run uses this folder and delivers its own records; run `mixtune sync` again when it has ended"
        )
        return 0
    try:
        follow(folder)
        close_killed_run(folder)
        return _deliver(folder)
    finally:
        lock.release()


def _deliver(folder: Path) -> int:
    from mixtune.components.shared.errors import first_line
    from mixtune.components.shared.tracking.mlflow_store import store_at

    journal = journal_folder(folder)
    status = 0
    for address in undelivered(journal).addresses:
        before = undelivered(journal, address).counts
        problem = ""
        try:
            store_at(address).deliver_leftovers(journal)
        except UnreachableError:
            status, problem = EXIT_STATUS["unreachable"], f"{folder}: no MLflow server answers at {address}"
        except Exception as error:
            status = max(status, EXIT_STATUS["failed"])
            problem = f"{folder}: MLflow at {address} rejects the records ({first_line(error)})"
        after = undelivered(journal, address).counts
        if before - after:
            print(f"{folder}: delivered to MLflow at {address}: {in_words(before - after)}")
        if problem:
            print(f"{problem}; still undelivered: {in_words(after)}")
    return status
