"""Journals in one folder that several processes write, check and deliver at the same time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

from mixtune.components.shared.tracking.journal import Journal, JournalOwner, journals, locked, read, undelivered

OWNER = JournalOwner("http://mlflow.example", "mixtune", "evaluate mixed-0.3", "run-1")
COUNT = 200


def append(folder: Path, name: str) -> None:
    journal = Journal.start(folder, JournalOwner(OWNER.address, OWNER.experiment, name, "run-1"))
    for number in range(COUNT):
        journal.append({"op": "tags", "run": name, "values": {"number": str(number)}})
    journal.release()


def take_all(folder: Path) -> None:
    """Delivers journals of ended steps until all steps have ended, and notes each operation in a file."""
    while not (folder / "ended").exists() or journals(folder):
        for path in journals(folder):
            journal = Journal.take(path)
            if journal is None:
                continue
            with (folder / "delivered.txt").open("a") as file:
                file.writelines(f"{one['run']} {one['values']['number']}\n" for one in journal.pending)
            journal.advance(len(journal.pending))
            journal.close()
        undelivered(folder)


def test_operations_of_several_processes_are_delivered_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    takers = [context.Process(target=take_all, args=(tmp_path,)) for _ in range(2)]
    writers = [context.Process(target=append, args=(tmp_path, f"step-{number}")) for number in range(3)]
    for process in (*takers, *writers):
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    (tmp_path / "ended").touch()
    for process in takers:
        process.join()
        assert process.exitcode == 0
    delivered = (tmp_path / "delivered.txt").read_text().splitlines()
    assert sorted(delivered) == sorted(f"step-{step} {number}" for step in range(3) for number in range(COUNT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delivered.txt", "ended"], (
        "no journal and no lock is left"
    )


def write_and_wait(folder: Path) -> None:
    journal = Journal.start(folder, OWNER)
    journal.append({"op": "tags", "run": "r", "values": {"number": "0"}})
    (folder / "written").touch()
    time.sleep(60)


def test_the_journal_of_a_running_step_is_taken_after_a_kill_only(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=write_and_wait, args=(tmp_path,))
    process.start()
    while not (tmp_path / "written").exists():
        time.sleep(0.01)
    (path,) = journals(tmp_path)
    assert Journal.take(path) is None
    assert not undelivered(tmp_path).counts, "the step delivers it itself"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert undelivered(tmp_path).counts == {"tag": 1}
    journal = Journal.take(path)
    assert journal is not None
    assert [operation["values"]["number"] for operation in journal.pending] == ["0"]
    journal.release()
    again = Journal.take(path)
    assert again is not None, "a released journal can be taken again"
    again.release()


def test_a_journal_in_use_in_this_process_is_not_taken(tmp_path: Path) -> None:
    journal = Journal.start(tmp_path, OWNER)
    assert Journal.take(journal.path) is None
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_taken_journal_is_continued_at_its_end(tmp_path: Path) -> None:
    journal = Journal.start(tmp_path, OWNER)
    journal.append({"op": "tags", "run": "r", "values": {}})
    journal.release()
    taken = Journal.take(journal.path)
    assert taken is not None
    taken.append({"op": "tags", "run": "s", "values": {}})
    taken.release()
    content = read(journal.path)
    assert content is not None
    assert [operation["run"] for operation in content[1]] == ["r", "s"]


def count_up(folder: Path) -> None:
    for _ in range(50):
        with locked(folder):
            file = folder / "count.json"
            value = json.loads(file.read_text()) if file.exists() else 0
            file.write_text(json.dumps(value + 1))


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_up, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert json.loads((tmp_path / "count.json").read_text()) == 150
