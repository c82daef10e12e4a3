"""What `tutelage train` shows: a table that is redrawn on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tutelage.trainer.cluster.supervisor import StudentRun
from tutelage.trainer.metrics.progress import tokens_per_second

_LINE_EVERY_SECONDS = 15.0


@dataclass
class _Pace:
    """When a student's steps were first seen, from which its finishing time follows."""

    first_step: int
    first_seen_seconds: float
    first_kl: float | None = None

    def seconds_left(self, step: int, steps: int, now_seconds: float) -> float | None:
        """None before a step was seen to end."""
        done = step - self.first_step
        return (now_seconds - self.first_seen_seconds) / done * (steps - step) if done > 0 else None


class Display:
    """Follows the students of a cohort; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._paces: dict[str, _Pace] = {}
        self._next_line_seconds = 0.0
        self._printed: dict[str, str] = {}

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, students: list[StudentRun]) -> None:
        """Shows where everybody is."""
        for student in students:
            self._note(student)
        if self._live:
            self._live.update(self._table(students))
        else:
            self._lines(students)

    def _note(self, student: StudentRun) -> None:
        progress = student.status.progress if student.status else None
        if progress is None or ("heldout/forward_kl" not in progress.metrics and progress.step == 0):
            return
        pace = self._paces.setdefault(student.config.id, _Pace(progress.step, time.time()))
        if pace.first_kl is None:
            pace.first_kl = progress.metrics.get("heldout/forward_kl")

    def _table(self, students: list[StudentRun]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("student", "", "step", "loss", "held-out KL", "tokens/s", "ends", "now"):
            table.add_column(name)
        for student in students:
            table.add_row(*self._cells(student))
        return table

    def _cells(self, student: StudentRun) -> list[str | ProgressBar]:
        cells = self._texts(student)
        # Its own number of steps: one that trains for epochs works it out.
        progress = student.status.progress if student.status else None
        step, steps = (progress.step, progress.steps) if progress else (0, student.config.steps)
        step = student.outcome.step if student.outcome else step
        return [cells[0], ProgressBar(total=steps, completed=step, width=20), *cells[1:]]

    def _texts(self, student: StudentRun) -> list[str]:
        progress = student.status.progress if student.status else None
        if progress is None:
            return [student.config.id, f"0/{student.config.steps}", "", "", "", "", _phase(student)]
        metrics = progress.metrics
        pace = self._paces.get(student.config.id)
        left = pace.seconds_left(progress.step, progress.steps, time.time()) if pace else None
        kl, loss = metrics.get("heldout/forward_kl"), metrics.get("train/loss")
        step = student.outcome.step if student.outcome else progress.step
        return [
            student.config.id,
            f"{step}/{progress.steps}",
            "" if loss is None else f"{loss:.3f}",
            "" if kl is None or pace is None else f"{pace.first_kl:.3f} → {kl:.3f}",
            _speed(metrics),
            time.strftime("%H:%M:%S", time.localtime(time.time() + left)) if left and not student.outcome else "",
            _phase(student),
        ]

    def _lines(self, students: list[StudentRun]) -> None:
        """A line for each student every so often, and whenever its state changes."""
        due = time.time() >= self._next_line_seconds
        for student in students:
            if (due and student.state == "running") or self._printed.get(student.config.id) != student.state:
                names = ("", "step ", "loss ", "held-out KL ", "tokens/s ", "ends ", "")
                texts = zip(names, self._texts(student), strict=True)
                line = ", ".join(name + text for name, text in texts if text)
                self._console.print(line, highlight=False, soft_wrap=True)
                self._printed[student.config.id] = student.state
        if due:
            self._next_line_seconds = time.time() + _LINE_EVERY_SECONDS


def _phase(student: StudentRun) -> str:
    if student.error:
        return f"failed: {student.error}"
    if student.state != "running" or student.status is None:
        return student.state if student.state != "running" else "starting"
    return "paused" if student.status.paused else student.status.progress.phase


def _speed(metrics: dict[str, float]) -> str:
    speed = tokens_per_second(metrics)
    return "" if speed is None else f"{speed:,.0f}"
