"""When the supervisor wants a further process with a student's imports done; without Ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
from trainer_cases import student_config, write_rows

from trainer import supervisor
from trainer.config import CohortConfig
from trainer.progress import Progress, Status
from trainer.spare import Spare


@pytest.fixture
def started(monkeypatch):
    """The processes that were begun with: futures that are their own results, None while they import."""
    begun: list[SimpleNamespace] = []

    def remote() -> SimpleNamespace:
        begun.append(SimpleNamespace(process_id=None))
        return begun[-1]

    monkeypatch.setattr(ray, "remote", lambda **_: lambda _function: SimpleNamespace(remote=remote))
    monkeypatch.setattr(
        ray, "wait", lambda futures, timeout: ([one for one in futures if one.process_id], []), raising=True
    )
    monkeypatch.setattr(ray, "get", lambda future: future.process_id)
    return begun


def test_there_is_one_spare_process_until_a_student_has_taken_it(started):
    spare = Spare()
    spare.renew([1, 2])
    spare.renew([1, 2])  # It still imports.
    started[0].process_id = 3
    spare.renew([1, 2])
    assert len(started) == 1
    spare.renew([3, 2])  # Process 1 died.
    spare.renew([3, 2])
    assert len(started) == 2


def test_nobody_who_starts_waits_for_it(started, tiny_model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 4)
    students = tuple(student_config(tiny_model, data, id=name) for name in ("ann", "bob"))
    cohort = supervisor._Cohort(CohortConfig(output=tmp_path / "run", students=students))
    ann, bob = cohort.students
    trains = Status(Progress("ann", 1, 6, "sampling", {"train/loss": 1.0}), False, 1, 0.0)
    for ann.status, bob.status in (
        (None, None),
        (trains, None),
        (trains, Status(Progress("bob", 0, 6, ""), False, 2, 0)),
    ):
        ann.state = bob.state = "running"
        cohort._keep_spare()
    assert not started
    bob.status = trains
    cohort._keep_spare()
    assert len(started) == 1
    ann.state = bob.state = "finished"
    cohort._keep_spare()
    assert len(started) == 1
