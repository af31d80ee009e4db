"""Progress of long work: a bar with the time left where someone looks, a line a stage where nobody does."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
)


class Shown:
    """Writes to standard error, so that standard output is the result alone."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, markup=False, highlight=False, emoji=False)

    @contextmanager
    def stage(self, what: str, total: int | None = None) -> Iterator["_Bar"]:
        began = time.perf_counter()
        bar = _Bar()
        if sys.stderr.isatty():
            with Progress(*COLUMNS, console=self.console, transient=True) as progress:
                task = progress.add_task(what, total=total, note="")
                bar.move = lambda done, note: progress.update(task, completed=done, note=note)
                yield bar
        else:
            yield bar
        note = f", {bar.note}" if bar.note else ""
        self.console.print(f"{time.perf_counter() - began:7.1f} s  {what}{note}", soft_wrap=True)

    def say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)


class _Bar:
    def __init__(self) -> None:
        self.move, self.note = (lambda done, note: None), ""

    def step(self, done: int, note: str = "") -> None:
        self.note = note or self.note
        self.move(done, self.note)
