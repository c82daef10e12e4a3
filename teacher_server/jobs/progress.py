"""A progress bar for work of hours: how far, how fast, and at what time it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

Progressed = Callable[[int, int], None]
"""Told how many of how many are done."""


class _FinishColumn(ProgressColumn):
    # rich's own TimeRemainingColumn says how long it will take; for a night's work one wants to know when it ends.
    def render(self, task: Task) -> Text:
        """The time of day, with the date if it is another day."""
        if task.finished or task.time_remaining is None:
            return Text("")
        now, end = time.time(), time.time() + task.time_remaining
        same_day = time.localtime(now).tm_yday == time.localtime(end).tm_yday
        clock = time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M", time.localtime(end))
        return Text(f"done at {clock}")


@contextmanager
def progress(console: Console, what: str) -> Iterator[Progressed]:
    """A bar for the time of a `with` block; what it gives is told how many of how many are done."""
    bar = Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), _FinishColumn(), console=console)
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
