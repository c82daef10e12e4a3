"""What a person sees of a running cohort."""

from __future__ import annotations

import io

from rich.console import Console

from trainer_cases import student_config
from tutelage.errors import Unreachable
from tutelage.trainer.cluster.console import Display
from tutelage.trainer.cluster.run_control import RunStatus
from tutelage.trainer.cluster.supervisor import StudentRun
from tutelage.trainer.metrics.progress import ActorStatus, Outcome, Progress

METRICS = {
    "heldout/forward_kl": 2.0,
    "train/loss": 0.5,
    "train/tokens": 100,
    "seconds/sampling": 1.0,
    "seconds/scoring": 0.5,
    "seconds/stepping": 0.5,
    "seconds/waiting": 0.0,
}


def status_of(student: StudentRun) -> RunStatus:
    return RunStatus("run", 1, 0, 0.0, False, (student.as_status(),))


def shown(tiny_model, *, terminal: bool) -> str:
    """A student's life as a console shows it."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160)
    student = StudentRun(student_config(tiny_model, tiny_model / "rows.jsonl"))
    with Display(console) as display:
        display.update(status_of(student))
        student.state = "running"
        for step, phase, metrics in ((0, "loading", {}), (1, "sampling", METRICS), (3, "stepping", METRICS)):
            student.status = ActorStatus(Progress("ann", step, 6, phase, metrics), False, 1, 0.0)
            display.update(status_of(student))
        student.outcome, student.state = Outcome("ann", 6, True, None), "finished"
        display.update(status_of(student))
        student.error, student.state = Unreachable("no teacher answers"), "failed"
        display.update(status_of(student))
    return stream.getvalue()


def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each_change(tiny_model):
    lines = shown(tiny_model, terminal=False).splitlines()
    assert lines[0] == "ann, step 0/6, queued"
    assert lines[-2] == "ann, step 6/6, loss 0.500, held-out KL 2.000 → 2.000, tokens/s 50, finished"
    assert "failed: no teacher answers" in lines[-1]


def test_a_terminal_shows_a_table(tiny_model):
    text = shown(tiny_model, terminal=True)
    for expected in ("held-out KL", "6/6", "2.000 → 2.000", "50", "failed: no teacher answers"):
        assert expected in text


def test_the_bar_is_full_at_the_last_step_of_a_student_that_trains_for_epochs(tiny_model):
    stream = io.StringIO()
    student = StudentRun(student_config(tiny_model, tiny_model / "rows.jsonl", steps=1000, epochs=2))
    student.state, student.status = "running", ActorStatus(Progress("ann", 6, 6, "saving", METRICS), False, 1, 0.0)
    with Display(Console(file=stream, force_terminal=True, color_system=None, width=160)) as display:
        display.update(status_of(student))
    assert "━" * 20 in stream.getvalue()
