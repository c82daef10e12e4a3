"""The queue on disk: what was submitted is there after any end, in order, and for one process at a time."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tutelage.errors import Conflict, DataError, NotFound
from tutelage.evaluator.runner.requests import Evaluation, Labels, TaskRequest
from tutelage.evaluator.service.queue import FILE, IMPORTED, Entry, Queue, Score


def evaluation_of(name: str, *, seed: int = 0) -> Evaluation:
    labels = Labels(run="r1", student="gkd", temperature=2.0)
    return Evaluation(name, Path("/models/one"), labels, (TaskRequest("arithmetic", "paper", 5),), seed)


def reopened(queue: Queue, folder: Path) -> Queue:
    queue.close()
    return Queue(folder)


def test_entries_survive_in_the_order_of_their_submission(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    for name in ("b", "a", "c"):
        queue.submit(evaluation_of(name))
    scores = (Score("arithmetic", "paper", "accuracy", 0.5, 0.1, 5),)
    assert queue.take(0).evaluation.evaluation_id == "b"
    queue.change("b", state="done", scores=scores)
    before = queue.entries()
    queue = reopened(queue, tmp_path)
    assert queue.entries() == before
    assert [entry.evaluation.evaluation_id for entry in before] == ["b", "a", "c"]
    assert queue.get("b").scores == scores


def test_what_ran_when_the_process_ended_is_queued_again(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.submit(evaluation_of("a"))
    queue.take(0)
    queue = reopened(queue, tmp_path)
    assert queue.get("a").state == "queued"
    assert queue.take(0).evaluation == evaluation_of("a")


def test_what_failed_can_be_submitted_again_and_goes_to_the_end(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.submit(evaluation_of("a"))
    queue.take(0)
    queue.change("a", state="failed", error="no space left on device", items_done=3)
    queue.submit(evaluation_of("b"))
    again = queue.submit(evaluation_of("a"))
    assert (again.state, again.error, again.items_done) == ("queued", "", 0)
    assert [entry.evaluation.evaluation_id for entry in queue.entries()] == ["b", "a"]
    with pytest.raises(Conflict, match="choose another id"):
        queue.submit(evaluation_of("a", seed=1))
    assert reopened(queue, tmp_path).get("a").state == "queued"


@pytest.mark.parametrize("state", ["done", "cancelled"])
def test_what_ended_otherwise_stays_as_it_is(state: str, tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.submit(evaluation_of("a"))
    queue.take(0)
    queue.change("a", state=state)
    assert queue.submit(evaluation_of("a")).state == state
    assert queue.take(0) is None


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    with pytest.raises(Conflict, match="another evaluator serves it"):
        Queue(tmp_path)
    queue.submit(evaluation_of("a"))
    assert reopened(queue, tmp_path).get("a").number == 1


def test_a_queue_of_json_files_is_taken_over_once(tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a"), start=1):
        (tmp_path / f"{name}.json").write_text(Entry(number, evaluation_of(name), state="done").to_json())
    queue = Queue(tmp_path)
    assert [entry.evaluation for entry in queue.entries()] == [evaluation_of("b"), evaluation_of("a")]
    assert sorted(path.name for path in (tmp_path / IMPORTED).iterdir()) == ["a.json", "b.json"]
    assert reopened(queue, tmp_path).get("a").state == "done"


def test_what_is_no_queue_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.json").write_text(json.dumps({"number": 1}))
    with pytest.raises(DataError, match=r"a\.json holds what is not an evaluation.*move it away"):
        Queue(tmp_path / "json")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_bytes(b"no database at all, but a long enough text to look at " * 20)
    with pytest.raises(DataError, match="move it away"):
        Queue(tmp_path / "other")


def test_changes_are_on_disk_before_they_are_answered(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.submit(evaluation_of("a"))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / FILE).write_bytes((tmp_path / FILE).read_bytes())  # as a kill would leave it
    rows = sqlite3.connect(copy / FILE).execute("SELECT evaluation_id FROM evaluations").fetchall()
    assert rows == [("a",)]
    with pytest.raises(NotFound, match="submit it first"):
        queue.get("b")
