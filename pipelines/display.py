"""Shows a run to people: a progress bar for each running step in a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from mixtune.components.config import Config
from mixtune.components.mixed.config import candidates
from mixtune.components.shared.outcome import Outcome, load_outcomes
from mixtune.components.shared.running.context import WorkDone
from mixtune.components.shared.task_name import TaskName
from mixtune.components.shared.value_text import lambda_of, value_text

PLAIN_LINE_SECONDS = 15.0
WIDE = 120
"""Width in characters from which on intervals are shown with both ends."""
TITLE_WIDTH = 26


def titles_of(config: Config) -> list[str]:
    """Returns the titles of all tasks of a run."""
    mixed = [candidate.id for candidate in candidates(config.mixed)]
    tasks = [
        *(TaskName("prepare", stream=stream) for stream in ("pretrain", "finetune")),
        *(TaskName("mixed", candidate=one) for one in mixed),
        *(TaskName("evaluate", candidate=one) for one in ("pretrained", "finetuned", "interpolated", *mixed)),
        *map(TaskName, ("plan", "pretrain", "finetune", "compare", "register", "finish")),
    ]
    return [str(task) for task in tasks]


class _Bars(Progress):
    """One line with a bar for each running task, and a second line with what is done and measured."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields both lines of each task."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["text"]:
                yield Text(f"       {task.fields['text']}", no_wrap=True, overflow="ellipsis")


class Display:
    """Follows a run's files and shows its progress.

    Args:
        console: console to write to.
        titles: titles of all tasks of the run, from which the ended ones are counted; empty if they are not known.
    """

    def __init__(self, console: Console, titles: Sequence[str] = ()) -> None:
        self.console = console
        self._titles = frozenset(titles)
        self._width = max([TITLE_WIDTH, *map(len, titles)])
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._running: dict[str, str] = {}
        self._ended: set[str] = set()
        self._last_plain: dict[str, float] = {}
        self._offsets: dict[Path, int] = {}
        self._paths: tuple[Path, Path] | None = None

    @contextlib.contextmanager
    def following(self, progress: Path, outcomes: Path) -> Iterator[None]:
        """Shows the progress of a run until the block ends.

        Args:
            progress: file that the steps append to.
            outcomes: folder of the outcome records.
        """
        self._paths = (progress, outcomes)
        if not self.console.is_terminal:
            yield
            return
        spinner = SpinnerColumn("line" if self.console.options.ascii_only else "dots")
        columns = (
            spinner, TextColumn("{task.description}", markup=False), BarColumn(20),
            TextColumn("{task.fields[rate]:>15}", markup=False), TextColumn("{task.fields[left]:>7}", markup=False),
        )  # fmt: skip
        with _Bars(*columns, console=self.console, transient=True) as self._bars:
            yield
        self._bars = None

    def refresh(self) -> None:
        """Shows changes since the last call."""
        assert self._paths is not None
        progress, outcomes = self._paths
        for outcome in load_outcomes(outcomes):
            if outcome.title not in self._ended:
                self._show_outcome(outcome)
        for line in self._new_lines(progress):
            with contextlib.suppress(ValueError):  # a killed step can leave a partial line
                note = json.loads(line)
                title = note.pop("title")
                if note.pop("cached", False):
                    self._end(title, Text("from the cache"), style="dim")
                elif title not in self._ended:
                    self._show_work(title, WorkDone(**note) if note else None)

    def _new_lines(self, path: Path) -> list[str]:
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            block = file.read()
        whole, separator, _ = block.rpartition(b"\n")
        self._offsets[path] = self._offsets.get(path, 0) + len(whole) + len(separator)
        return whole.decode("utf-8", "replace").splitlines()

    def _show_outcome(self, outcome: Outcome) -> None:
        mark = (outcome.kind.replace("_", " "), "green" if outcome.kind == "done" else "red")
        self._end(outcome.title, Text.assemble(mark, (f" {outcome.seconds:.0f} s", "dim")))
        if outcome.title == "compare" and outcome.facts.get("gate", "passed") != "passed":
            self._end("register", Text("skipped, since the gate is not met"), style="dim")

    def _end(self, title: str, how: Text, style: str = "") -> None:
        self._ended.add(title)
        self._running.pop(title, None)
        if self._bars is not None and title in self._tasks:
            self._bars.remove_task(self._tasks.pop(title))
        self.console.print(Text.assemble(f"{self._numbered(self._count(self._ended), title)} ", how, style=style))

    def _numbered(self, number: int, title: str) -> str:
        """Returns the title in its column, after the number of the task."""
        total = len(self._titles)
        count = f"{number}/{total} " if title in self._titles else ""
        return f"  {count:>{len(f'{total}/{total} ') if total else 0}}{title:<{self._width}}"

    def _count(self, titles: Iterable[str]) -> int:
        """Counts tasks. How many portions a stream has is not known in advance, so the tasks that read them are not counted."""
        return len(self._titles.intersection(titles))

    def _show_work(self, title: str, work: WorkDone | None) -> None:
        self._running.setdefault(title, "")
        before = list(self._running)[: list(self._running).index(title)]
        number = self._count(self._ended) + 1 + self._count(before)
        if self._bars is not None:
            if title not in self._tasks:
                shown = self._numbered(number, title).removeprefix("  ")
                self._tasks[title] = self._bars.add_task(shown, total=None, rate="", left="", text="")
            if work is not None and work.total:
                left = str(datetime.timedelta(seconds=round(work.seconds_left)))
                self._bars.update(
                    self._tasks[title], completed=work.done, total=work.total, rate=work.rate, left=left, text=work.text
                )
            return
        now = time.monotonic()
        due = now - self._last_plain.get(title, now - PLAIN_LINE_SECONDS + 5) >= PLAIN_LINE_SECONDS
        if work is not None and work.done and due:
            self._last_plain[title] = now
            self.console.print(Text(f"{self._numbered(number, title)} {work.line}"))
        self._last_plain.setdefault(title, now)


def print_candidates(report: dict[str, Any], console: Console) -> None:
    """Prints the table of candidates as wide as the terminal allows, and in full where the output is no terminal."""
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(candidates_table(report, narrow=console.width < WIDE), soft_wrap=False)


def candidates_table(report: dict[str, Any], narrow: bool = False) -> Table:
    """Returns the table of candidates from `report.json`.

    Args:
        narrow: fits 80 columns: a value with half the width of its interval instead of both ends.
    """
    task = report["task"]
    title = Text(f"{report['name']}: candidates, on the test split", style="table.title")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    shown = _with_half_width if narrow else value_text
    if narrow:
        table.caption, table.caption_justify = Text("±: half the width of the interval"), "left"
    for heading, justify in (
        ("candidate", "left"), ("λ", "right"), (Text(task["metric"]), "left"), ("vs fine-tuned", "left"),
        ("forgetting, bits per byte", "left"), ("", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for one in report["candidates"]:
        chosen = one["id"] == report["selected"]
        mark = "← selected" if report["gate"]["passed"] else "← nearest"
        weight = lambda_of(one)
        table.add_row(
            Text(one["id"]),
            "" if weight is None else f"{weight:g}",
            shown(one["task_score"], signed=False),
            shown(one["task_score_vs_finetuned"]) if one["kind"] != "finetuned" else "",
            shown(one["delta_bpb"]) if one["kind"] != "pretrained" else "0",
            (mark[:1] if narrow else mark) if chosen else "",
            style="bold" if chosen else None,
        )
    for column in table.columns[1:5]:
        column.no_wrap = True
    if narrow:
        table.columns[4].header = "bits per byte"
    return table


def _with_half_width(value: dict[str, float | None] | None, signed: bool = True) -> str:
    if value is None or value["low"] is None or value["high"] is None:
        return value_text(value, signed=signed)
    return f"{value_text({**value, 'low': None}, signed=signed)} ±{(value['high'] - value['low']) / 2:.3f}"
