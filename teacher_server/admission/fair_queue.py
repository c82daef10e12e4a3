"""Who is next, and who is told to come back: start-time fair queueing in front of an engine or the signal head.

Every job has a cost: tokens for an engine, rows × vocabulary for the head. A student that always has a job
waiting is served in proportion to its weight, however many it has; what idle students leave goes to the
others. The queue is bounded: when it is full, who asks is refused, at once, unless it has less than its share of the
places; so nobody who waits is sent away, and nobody finds all places taken by others.

Start-time fair queueing: P. Goyal, H. Vin, H. Cheng, SIGCOMM 1996.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tutelage.errors import Overloaded

_SHORTEST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.05, 5.0


@dataclass(eq=False)
class _Job:
    cost: float
    size: int
    arrived: float
    admitted: asyncio.Future[None]


@dataclass(eq=False)
class _Student:
    weight: float
    start_tag: float = 0.0
    """Virtual time at which its next job may start: what it has received so far, divided by its weight."""
    waiting: deque[_Job] = field(default_factory=deque)


class FairQueue:
    """Admits jobs to a resource that holds a bounded amount of work; used on the event loop only.

    Args:
        capacity: size of the jobs that are admitted at once; a larger job is admitted alone.
        max_waiting: jobs that wait before any is refused; with those of students below their share at most twice as
            many, or one a student. None if something else bounds them.
        weights: share of a student relative to the others, > 0; 1 for who is not named.

    """

    def __init__(
        self, *, capacity: int, max_waiting: int | None = None, weights: Mapping[str, float] | None = None
    ) -> None:
        self._capacity, self._max_waiting, self._weights = capacity, max_waiting, weights or {}
        self._students: dict[str, _Student] = {}  # those with waiting jobs, or ahead of the virtual time
        # Who came last, and the last one before who was somebody else; with monotonic seconds.
        self._latest = self._before = ("", -math.inf)
        self._virtual_time = 0.0
        self._last_wait_seconds = 0.0
        self._busy_since, self._busy_seconds = 0.0, 0.0
        self.admitted_size = 0
        self.waiting = 0

    @property
    def busy_seconds(self) -> float:
        """Time during which at least one job was admitted."""
        running = time.monotonic() - self._busy_since if self.admitted_size else 0.0
        return self._busy_seconds + running

    def others_came_within(self, seconds: float, student_id: str) -> bool:
        """Whether any other student has asked so lately."""
        _, came = self._latest if self._latest[0] != student_id else self._before
        return time.monotonic() - came < seconds

    @asynccontextmanager
    async def admitted(self, student_id: str, *, cost: float, size: int, begun: bool = False) -> AsyncIterator[float]:
        """Waits for this job's turn; the block is the work. Cancelling frees the place at once.

        Args:
            student_id: on whose account.
            cost: what is shared out fairly, > 0.
            size: part of the capacity that the job holds.
            begun: the job goes on with one that was admitted before, and is not refused.

        Yields:
            Seconds waited.

        Raises:
            Overloaded: the queue is full, and this student has its share of it.

        """
        loop = asyncio.get_running_loop()
        student = self._students.setdefault(student_id, _Student(self._weights.get(student_id, 1.0)))
        if not student.waiting:  # it was idle: what it did not use then is not owed to it
            student.start_tag = max(self._virtual_time, student.start_tag)
        job = _Job(cost, size, loop.time(), loop.create_future())
        if student_id != self._latest[0]:
            self._before = self._latest
        self._latest = (student_id, time.monotonic())
        student.waiting.append(job)
        self.waiting += 1
        self._admit()
        if self._max_waiting is not None and self.waiting > self._max_waiting and not (begun or job.admitted.done()):
            self._refuse_beyond_share(self._max_waiting, student, job)
        try:
            await job.admitted
        except asyncio.CancelledError:
            # Cancelled while it waited, or just when it was admitted: the future may have its result already.
            if job in student.waiting:
                self._drop(student, job)
            elif not job.admitted.cancelled() and job.admitted.exception() is None:
                self._release(job.size)
            raise
        try:
            yield loop.time() - job.arrived
        finally:
            self._release(size)

    def settle(self, student_id: str, difference: float) -> None:
        """Puts right what a job was thought to cost: the difference is added to its student's account."""
        student = self._students.get(student_id)
        if student is None:
            student = _Student(self._weights.get(student_id, 1.0), self._virtual_time)
        student.start_tag += difference / student.weight
        if difference > 0:  # who is owed something and waits for nothing would be forgotten anyway
            self._students[student_id] = student

    def _admit(self) -> None:
        """Starts waiting jobs, the one with the smallest start tag first, while there is room."""
        while self.waiting:
            student = min((each for each in self._students.values() if each.waiting), key=lambda each: each.start_tag)
            job = student.waiting[0]
            if self.admitted_size and self.admitted_size + job.size > self._capacity:
                break
            self._drop(student, job)
            if job.admitted.cancelled():
                continue
            self._virtual_time = student.start_tag
            student.start_tag += job.cost / student.weight
            if not self.admitted_size:
                self._busy_since = time.monotonic()
            self.admitted_size += job.size
            self._last_wait_seconds = asyncio.get_running_loop().time() - job.arrived
            job.admitted.set_result(None)
        # Forgotten are those who would start with the same tag if they came anew: the others are ahead of their share.
        self._students = {
            student_id: student
            for student_id, student in self._students.items()
            if student.waiting or student.start_tag > self._virtual_time
        }

    def _release(self, size: int) -> None:
        self.admitted_size -= size
        if not self.admitted_size:
            self._busy_seconds += time.monotonic() - self._busy_since
        self._admit()
        if not self.admitted_size and not self.waiting:  # nobody competes: all start anew
            self._students.clear()
            self._virtual_time = 0.0

    def _refuse_beyond_share(self, max_waiting: int, student: _Student, job: _Job) -> None:
        """Refuses a job of who has its share of the waiting places; nobody who waits already is sent away.

        Pushing out those of others who wait made refusals slow: 96 to 118 ms at the 99th percentile (docs/teacher.md).
        """
        competing = sum(bool(each.waiting) for each in self._students.values())
        if len(student.waiting) <= max(1, max_waiting // competing):
            return
        self._drop(student, job)
        seconds = min(max(self._last_wait_seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS)
        message = f"{self.waiting} requests wait already, this student's share among them; ask again later"
        raise Overloaded(message, retry_after_milliseconds=round(1000 * seconds))

    def _drop(self, student: _Student, job: _Job) -> None:
        student.waiting.remove(job)
        self.waiting -= 1
