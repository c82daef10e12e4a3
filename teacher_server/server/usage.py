"""What each student has received since the server started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tutelage.rpc.v1 import teacher_pb2 as pb
from tutelage.teacher_server.admission.validation import Scoring


class Usage:
    """Counters by student; used on the event loop only."""

    def __init__(self) -> None:
        self._students: dict[str, pb.StudentUsage] = {}

    def of(self, student_id: str) -> pb.StudentUsage:
        """The counters of one student, to be added to; marks it as seen now."""
        counters = self._students.setdefault(student_id, pb.StudentUsage(student_id=student_id))
        counters.last_seen_seconds = time.time()
        return counters

    @contextmanager
    def stream(self, student_id: str) -> Iterator[None]:
        """Counts an open stream."""
        self.of(student_id).open_streams += 1
        try:
            yield
        finally:
            self.of(student_id).open_streams -= 1

    def snapshot(self) -> list[pb.StudentUsage]:
        """All students, by id."""
        return [self._students[student_id] for student_id in sorted(self._students)]


def count_frame(counters: pb.StudentUsage, frame: pb.SignalFrame) -> None:
    """Adds a frame that was sent."""
    counters.rows += frame.position_count
    counters.bytes += frame.ByteSize()


def count_sequence(counters: pb.StudentUsage, scoring: Scoring) -> None:
    """Adds a sequence that was answered in full."""
    counters.sequences += 1
    counters.tokens += len(scoring.token_ids)
