"""Shows a run to people: a progress bar for each running step in a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mixtune.components.shared.outcome import load_outcomes
from mixtune.components.shared.task_name import TaskName
from mixtune.components.shared.value_text import value_text

PLAIN_LINE_SECONDS = 15.0
WIDE = 120
"""Width in characters from which on intervals are shown with both ends."""
_CACHE_HIT = re.compile(r"Task (\S+) cache hit")


class Display:
    """Follows a run's files and shows its progress.

    Args:
        console: console to write to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._seen: set[str] = set()
        self._last_plain: dict[str, float] = {}
        self._offsets: dict[Path, int] = {}
        self._paths: tuple[Path, Path, Path] | None = None

    @contextlib.contextmanager
    def following(self, progress: Path, outcomes: Path, log: Path) -> Iterator[None]:
        """Shows the progress of a run until the block ends.

        Args:
            progress: file that the steps append to.
            outcomes: folder of the outcome records.
            log: KFP's log, the only source of information about cached tasks.
        """
        self._paths = (progress, outcomes, log)
        if not self.console.is_terminal:
            yield
            return
        spinner = SpinnerColumn("line" if self.console.options.ascii_only else "dots")
        columns = (
            spinner, TextColumn("{task.description:<28}", markup=False), BarColumn(),
            TextColumn("{task.fields[rate]:>14}", markup=False), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as self._bars:
            yield
        self._bars = None

    def refresh(self) -> None:
        """Shows changes since the last call."""
        assert self._paths is not None
        progress, outcomes, log = self._paths
        for line in self._new_lines(log):
            hit = _CACHE_HIT.search(line)
            if hit:
                title = str(TaskName.of_package_task(hit.group(1)) or hit.group(1))
                self.console.print(Text(f"  {title:<28} from the cache", style="dim"))
        for line in self._new_lines(progress):
            with contextlib.suppress(ValueError):
                self._show_progress(json.loads(line))
        for outcome in load_outcomes(outcomes):
            if outcome.title in self._seen:
                continue
            self._seen.add(outcome.title)
            self._remove_bars_of(outcome.title)
            mark = (outcome.kind.replace("_", " "), "green" if outcome.kind == "done" else "red")
            seconds = (f"{outcome.seconds:.0f} s", "dim")
            self.console.print(Text.assemble(f"  {outcome.title:<28} ", mark, " ", seconds))

    def _new_lines(self, path: Path) -> list[str]:
        if not path.is_file():
            return []
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            block = file.read()
        whole, separator, _ = block.rpartition(b"\n")
        self._offsets[path] = self._offsets.get(path, 0) + len(whole) + len(separator)
        return whole.decode("utf-8", "replace").splitlines()

    def _show_progress(self, note: dict[str, Any]) -> None:
        title, rate = note["title"], note["tokens_per_second"]
        words = f"{rate:,} tokens/s" if rate else f"{note['done']}/{note['total']} {note['unit']}"
        if self._bars is not None:
            if title not in self._tasks:
                for name in [name for name in self._tasks if _is_of(title, name)]:
                    self._bars.remove_task(self._tasks.pop(name))
                self._tasks[title] = self._bars.add_task(title, total=None, rate="")
            if note["total"]:
                self._bars.update(self._tasks[title], completed=note["done"], total=note["total"], rate=words)
            return
        now = time.monotonic()
        if note["done"] and now - self._last_plain.get(title, now - PLAIN_LINE_SECONDS + 5) >= PLAIN_LINE_SECONDS:
            self._last_plain[title] = now
            left = f", {note['seconds_left']:.0f} s left"
            self.console.print(Text(f"  {title}: {note['done']}/{note['total']} {note['unit']}, {words}{left}"))
        self._last_plain.setdefault(title, now)

    def _remove_bars_of(self, title: str) -> None:
        for name in [name for name in self._tasks if _is_of(name, title)]:
            if self._bars is not None:
                self._bars.remove_task(self._tasks[name])
            del self._tasks[name]


def _is_of(bar: str, title: str) -> bool:
    """Tells whether a bar shows a task or some work within it, such as `mixed-0.3 tokens`."""
    return f"{bar} ".startswith(f"{title} ")


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
        weight = one.get("lambda")
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
