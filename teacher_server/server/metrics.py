"""Prometheus metrics of a teacher: the counters that GetTeacherUsage gives, on a port of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tutelage.errors import ConfigurationError
from tutelage.rpc.v1 import teacher_pb2 as pb

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


class UsageCollector(Collector):
    """Turns a usage report into metrics whenever Prometheus asks."""

    def __init__(self, usage: Callable[[], pb.GetTeacherUsageResponse]) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client defines it."""
        usage = self._usage()
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


def serve(host: str, port: int, usage: Callable[[], pb.GetTeacherUsageResponse]) -> Callable[[], None]:
    """Answers on http://host:port/metrics from a thread, until the function that it returns is called.

    Its server knows no authentication.

    Raises:
        ConfigurationError: the port is taken, or the host is no address of this machine.

    """
    registry = CollectorRegistry()
    registry.register(UsageCollector(usage))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigurationError(f"cannot serve metrics at {host}:{port}: {error}", "metrics_port") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
