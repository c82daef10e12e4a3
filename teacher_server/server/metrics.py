"""Prometheus metrics of a teacher: what GetTeacherUsage counts, its limits, and vLLM's own of its engines."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tutelage.rpc.metrics import disk_metrics
from tutelage.teacher_server.config import TeacherConfig
from tutelage.teacher_server.engine.metrics import merged
from tutelage.teacher_server.server.servicer import TeacherServicer

_STUDENT_COUNTERS = {
    "sequences": "Sequences answered in full.",
    "tokens": "Tokens of those sequences.",
    "rows": "Scored positions sent.",
    "bytes": "Bytes of frames sent.",
    "refusals": "Requests refused.",
    "generated_tokens": "Tokens generated.",
    "computed_tokens": "Tokens that the scoring engine computed.",
    "cached_tokens": "Tokens that the scoring engine had in its prefix cache instead.",
    "prefix_hits": "Engine passes that found something there.",
    "store_hits": "Sequences whose hidden states were stored or under way already.",
    "queue_seconds": "Time waited for the engine and the signal head.",
    "service_seconds": "Time that engine and signal head worked for the student, a batch once a sequence.",
}


class TeacherCollector(Collector):
    """What a teacher says of itself whenever Prometheus asks.

    Args:
        servicer: who counts.
        config: what it was told.

    """

    def __init__(self, servicer: TeacherServicer, config: TeacherConfig) -> None:
        self._servicer, self._config = servicer, config

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client defines it."""
        yield GaugeMetricFamily(
            "tutelage_teacher_serving",
            "Whether it answers: not while it loads, nor when it drains.",
            value=self._servicer.serving,
        )
        yield from self._usage()
        yield from self._queues()
        if self._config.store is not None:
            yield from disk_metrics("teacher", {"store": self._config.store.path})
        teacher = self._servicer.teacher
        engines = teacher.engines if teacher is not None else ()
        yield from merged(metric for engine in engines for metric in engine.metrics())

    def _usage(self) -> Iterator[Metric]:
        usage = self._servicer.usage()
        for field, text in _STUDENT_COUNTERS.items():
            counter = CounterMetricFamily(f"tutelage_teacher_{field}", text, labels=["student"])
            for student in usage.students:
                counter.add_metric([student.student_id], getattr(student, field))
            yield counter
        streams = GaugeMetricFamily("tutelage_teacher_open_streams", "Streams open now.", labels=["student"])
        for student in usage.students:
            streams.add_metric([student.student_id], student.open_streams)
        yield streams
        yield CounterMetricFamily(
            "tutelage_teacher_engine_passes", "Passes of the scoring engine.", value=usage.engine_passes
        )
        yield CounterMetricFamily(
            "tutelage_teacher_engine_busy_seconds", "Time with work for the engine.", value=usage.engine_busy_seconds
        )
        yield CounterMetricFamily(
            "tutelage_teacher_head_busy_seconds", "Time with work for the signal head.", value=usage.head_busy_seconds
        )
        yield GaugeMetricFamily(
            "tutelage_teacher_waiting_sequences", "Sequences that wait for it now.", value=usage.waiting_sequences
        )
        yield GaugeMetricFamily("tutelage_teacher_stored_bytes", "Size of the signal store.", value=usage.stored_bytes)

    def _queues(self) -> Iterator[Metric]:
        teacher = self._servicer.teacher
        yield GaugeMetricFamily(
            "tutelage_teacher_waiting_prompts",
            "Prompts that wait for the generating engine now.",
            value=0 if teacher is None else teacher.generation_queue.waiting,
        )
        yield GaugeMetricFamily(
            "tutelage_teacher_max_waiting_requests",
            "So many sequences, and so many prompts, may wait; then students with their share are refused.",
            value=self._config.max_waiting_requests,
        )
        if self._config.store is not None:
            yield GaugeMetricFamily(
                "tutelage_teacher_max_stored_bytes", "Size that the store may have.", value=self._config.store.bytes
            )
