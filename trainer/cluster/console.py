"""What people see of a run's status: a table that is redrawn on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tutelage.trainer.cluster.run_control import RunStatus, StudentStatus
from tutelage.trainer.metrics.progress import metric_texts, progress_line

_LINE_EVERY_SECONDS = 15.0
_WIDTH_WITH_BARS = 110


@dataclass
class _Pace:
    """When a student's steps were first seen, from which its finishing time follows."""

    first_step: int
    first_seen_seconds: float
    first_kl: float | None = None

    def ends_at(self, step: int, steps: int) -> str:
        """The clock time of its last step; empty before a step was seen to end."""
        done, now = step - self.first_step, time.time()
        if done <= 0 or step >= steps:
            return ""
        left_seconds = (now - self.first_seen_seconds) / done * (steps - step)
        return time.strftime("%H:%M:%S", time.localtime(now + left_seconds))


class Display:
    """Follows the students of a run; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # `Live` moves the cursor: in a file, or in the log of a Ray job, that would be control characters.
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._paces: dict[str, _Pace] = {}
        self._next_line_seconds = 0.0
        self._printed: dict[str, str] = {}
        self._noted: set[str] = set()

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, status: RunStatus) -> None:
        """Shows where everybody is: as a table, or with a line every so often and whenever a state changes."""
        texts = {}
        for student in status.students:
            kl, first_kl, ends = student.metrics.get("heldout/forward_kl"), None, ""
            if kl is not None or student.step > 0:
                pace = self._paces.setdefault(student.student, _Pace(student.step, time.time()))
                pace.first_kl = first_kl = kl if pace.first_kl is None else pace.first_kl
                ends = pace.ends_at(student.step, student.steps) if student.state == "running" else ""
            texts[student.student] = metric_texts(student.metrics, first_forward_kl=first_kl) | {"ends": ends}
            for note in student.notes:
                line = f"{student.student}: {note}"
                if line not in self._noted:
                    self._noted.add(line)
                    self._console.print(line, highlight=False, soft_wrap=True)
        if self._live:
            self._live.update(students_table(status, texts, self._console.width))
            return
        due = time.time() >= self._next_line_seconds
        for student in status.students:
            if (due and student.state == "running") or self._printed.get(student.student) != student.state:
                line = progress_line(student.step, student.steps, texts[student.student], what_now(student))
                self._console.print(f"{student.student}, {line}", highlight=False, soft_wrap=True)
                self._printed[student.student] = student.state
        if due:
            self._next_line_seconds = time.time() + _LINE_EVERY_SECONDS


def students_table(status: RunStatus, texts: dict[str, dict[str, str]], width: int) -> Table:
    """A row a student: how far it is, what is known of it, and what it does now.

    Args:
        status: of the run.
        texts: what is known of each student, by heading.
        width: of the terminal, in columns; a narrow one has no room for bars.

    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    headings = list(next(iter(texts.values()), {}))
    bars = [""] * (width >= _WIDTH_WITH_BARS)
    for heading in ("student", *bars, "step", *headings, "now"):
        table.add_column(heading)
    for student in status.students:
        bar = [ProgressBar(total=student.steps, completed=student.step, width=20)] * len(bars)
        known = [texts[student.student][heading] for heading in headings]
        table.add_row(student.student, *bar, f"{student.step}/{student.steps}", *known, what_now(student))
    return table


def what_now(student: StudentStatus) -> str:
    """What a student does at the moment, or how it ended."""
    if student.state == "failed":
        return f"failed: {student.phase}"
    return student.phase if student.state == "running" else student.state
