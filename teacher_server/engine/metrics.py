"""vLLM's own metrics of the engines of one process, under vLLM's names.

vLLM keeps them in prometheus_client's global registry, where each engine that starts throws out those of the one
before. Here each engine has a registry of its own, and its role and number as labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from tutelage.runtime import vllm_api
from tutelage.teacher_server.config import Role


class EngineMetrics:
    """Of one engine.

    Args:
        role: what it does.
        replica: which of the engines that do so.

    """

    def __init__(self, role: Role, replica: int) -> None:
        self._labels = {"role": role, "replica": str(replica)}
        self._registry = CollectorRegistry()

    def stat_logger(self) -> type:
        """What vLLM is to tell what it does: its own class, with this registry."""
        kinds = {"_gauge_cls": Gauge, "_counter_cls": Counter, "_histogram_cls": Histogram}
        here = {name: partial(kind, registry=self._registry) for name, kind in kinds.items()}
        return type("EngineStatLogger", (vllm_api.PrometheusStatLogger,), here)

    def collect(self) -> Iterable[Metric]:
        """What they are now."""
        for metric in self._registry.collect():
            metric.samples = [sample._replace(labels={**sample.labels, **self._labels}) for sample in metric.samples]
            yield metric


def merged(metrics: Iterable[Metric]) -> Iterable[Metric]:
    """Those of several engines, each name once, as Prometheus has to have them."""
    families: dict[str, Metric] = {}
    for metric in metrics:
        if metric.name in families:
            families[metric.name].samples += metric.samples
        else:
            families[metric.name] = metric
    return families.values()
