"""Documents in /metrics: what came of the prompts that were submitted before their search had ended.

Invariant: no label has a value that a client chose, and nothing tells whose documents were searched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from stemcache.ragcache.context_cache import ContextCache


class DocumentCollector(Collector):
    """Reads the counters when Prometheus comes."""

    def __init__(self, documents: ContextCache) -> None:
        self._documents = documents

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._documents.speculation()
        yield CounterMetricFamily(
            "stemcache_speculations_started", "Prompts submitted before their search had ended.", stats.started
        )
        ended = CounterMetricFamily("stemcache_speculations", "What became of them.", labels=["outcome"])
        ended.add_metric(["stood"], stats.stood)
        ended.add_metric(["cancelled"], stats.cancelled)
        ended.add_metric(["gave_way"], stats.gave_way)
        yield ended
        yield CounterMetricFamily(
            "stemcache_speculation_saved_seconds",
            "Time by which the engine had begun with an answer when its search ended.",
            stats.saved_seconds,
        )
