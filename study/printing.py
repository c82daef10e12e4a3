"""What the commands show: the plan, the cells, how far a study is, its progress while it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tutelage.study.cells import Cell
from tutelage.study.folder import Folder
from tutelage.study.plan import Cost, measured_seconds
from tutelage.study.resolution import Study

_SHORTEST_IN_HOURS = 1.5
_QUIET_SECONDS = 60.0  # between two lines of progress where there is no terminal


def print_plan(study: Study, cost: Cost) -> None:
    """What there is to do, what is shared, what it costs."""
    console = Console(highlight=False)
    counts = Table("kind", "cells", "seeds", "students")
    counts.add_row("models before the domain", str(len(study.base)), "–", "–")
    counts.add_row("teachers fine-tuned", str(len(study.tuned)), "–", "–")
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in study.students:
        groups.setdefault((cell.method, cell.teacher), []).append(cell)
    for (method, teacher), cells in groups.items():
        sizes, seeds = len({cell.model for cell in cells}), len({cell.seed for cell in cells})
        counts.add_row(f"{method}, teacher {teacher}" if teacher else method, str(len(cells)), str(seeds), str(sizes))
    console.print(counts)
    for one in cost.teachers:
        console.print(
            f"teacher {one.teacher}: {one.cells} cells ask it. It scores {_count(one.shared_tokens)} tokens of the "
            f"data once instead of {_count(one.unshared_tokens)}, up to {_count(one.sampled_tokens)} that students "
            f"write, and writes up to {_count(one.written_tokens)}; up to {one.hidden_bytes / 2**30:.2f} GiB of "
            "hidden states travel",
            soft_wrap=True,
        )
    if not cost.data_is_here:
        console.print(f"{study.config.data} is not here, so what of it is scored and written is not counted above")
    hours = "for how long is not known" if cost.hours is None else f"about {cost.hours:.1f} hours"
    if cost.hours is not None and cost.hours < _SHORTEST_IN_HOURS:
        hours = f"about {60 * cost.hours:.0f} minutes"
    console.print(
        f"{cost.done} cells are done, {cost.missing} are missing: up to {_count(cost.trained_tokens)} tokens to train "
        f"on, {hours} with {study.config.concurrency} at once ({cost.source})",
        soft_wrap=True,
    )


def print_cells(study: Study, folder: Folder) -> None:
    """Every cell and where it is."""
    table = Table("cell", "steps", "state")
    for cell in study.cells:
        table.add_row(cell.id, str(cell.steps), _state(study, folder, cell))
    Console(highlight=False).print(table)


def print_status(study: Study, folder: Folder) -> None:
    """How far it is, what is under way, when it will end."""
    console = Console(highlight=False)
    states = {cell: _state(study, folder, cell) for cell in study.cells}
    done = sum(state == "done" for state in states.values())
    driver = folder.driver()
    console.print(
        f"{study.config.name}: {done} of {len(states)} cells done; "
        + (f"process {driver} runs it" if driver else "nothing runs it")
    )
    for cell, state in states.items():
        if state not in ("done", "missing"):
            console.print(f"  {cell.id}: {state}", soft_wrap=True)
    seconds = measured_seconds(study, folder)
    left = sum(state == "missing" for state in states.values())
    if driver and seconds and left:
        mean = sum(seconds.values()) / len(seconds)
        ends = datetime.now() + timedelta(seconds=left * mean / study.config.concurrency)
        console.print(f"ends about {ends:%a %H:%M}: {mean:.0f} s a cell, {len(seconds)} cells measured")


def _state(study: Study, folder: Folder, cell: Cell) -> str:
    if folder.is_done(cell, study.evaluation_id(cell)):
        return "done"
    if folder.is_trained(cell):
        return "trained, to be scored"
    metrics = folder.path("students", cell.id, "metrics.jsonl")
    if not metrics.exists():
        return "missing"
    # What follows the last line's end is what the trainer is writing now.
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]
    return f"step {json.loads(lines[-1])['step'] if lines else 0} of {cell.steps}"


@contextmanager
def progress(study: Study) -> Iterator[tuple[Callable[[str], None], Callable[[int], None]]]:
    """Two functions: one says a line, one is told how many cells are done and shows when all will be."""
    console = Console(stderr=True, highlight=False)
    # On stderr, and no bar in a file: a log gets a line a minute instead.
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        shown = _Shown(bar, bar.add_task("", total=len(study.cells)), len(study.cells))

        def say(text: str) -> None:
            bar.console.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] {text}", soft_wrap=True)

        yield say, lambda done: shown.update(done, say)


class _Shown:
    """The bar; without a terminal a line now and then."""

    def __init__(self, bar: Progress, task: TaskID, total: int) -> None:
        self._bar, self._task, self._total = bar, task, total
        self._started, self._said = time.monotonic(), time.monotonic()
        self._before: int | None = None

    def update(self, done: int, say: Callable[[str], None]) -> None:
        """Shows that so many cells are done."""
        self._before = done if self._before is None else self._before  # what earlier runs did says nothing of speed
        ends = ""
        if done > self._before:
            seconds = (time.monotonic() - self._started) / (done - self._before) * (self._total - done)
            ends = f"ends {datetime.now() + timedelta(seconds=seconds):%a %H:%M}"
        self._bar.update(self._task, completed=done, description=ends)
        if self._bar.disable and time.monotonic() - self._said >= _QUIET_SECONDS:
            self._said = time.monotonic()
            say(f"{done} of {self._total} cells{', ' + ends if ends else ''}")


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"
