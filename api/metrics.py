"""Metrics for Prometheus: names, meanings and buckets are vLLM's where vLLM has them, with the prefix `stemcache_`.

Invariant: counters count up and nothing else: a hit rate is the quotient of two counters' rates, for the reader to take
over the time that interests them. No label has a value that a client chose. Each application has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from stemcache.api.cold_metrics import cold_metrics
from stemcache.api.context import Outcome
from stemcache.api.recent import is_cached
from stemcache.engine.outputs import Usage
from stemcache.engine.timing import Timing

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine


def _buckets(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


# vLLM's, from vllm/v1/metrics/loggers.py
_FIRST: Final = _buckets(".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560")
_NEXT: Final = _buckets(".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80")
_WHOLE: Final = _buckets(".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")


class Metrics:
    """What happened to requests, and what the engine says of itself when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self._requests = Counter(
            "stemcache_requests",
            "HTTP requests by route and outcome.",
            ["route", "outcome"],
            registry=self.registry,
        )
        self._finished = Counter(
            "stemcache_request_success",
            "Choices that were generated to their end, by the reason of the end.",
            ["finished_reason"],
            registry=self.registry,
        )
        first = Histogram(
            "stemcache_time_to_first_token_seconds",
            "From a request's arrival to its first token; cached: more than half of its prompt was found.",
            ["prompt"],
            buckets=_FIRST,
            registry=self.registry,
        )
        self._cached, self._computed = first.labels("cached"), first.labels("computed")
        self._next = self._seconds("inter_token_latency", "From one token of a choice to its next.", _NEXT)
        self._whole = self._seconds("e2e_request_latency", "From a request's arrival to its last token.", _WHOLE)
        self._queue = self._seconds("request_queue_time", "From a prompt's submission to its start.", _WHOLE)
        self._prefill = self._seconds("request_prefill_time", "From a prompt's start to its first token.", _WHOLE)
        self._decode = self._seconds("request_decode_time", "From a prompt's first token to its last.", _WHOLE)

    def request(self, route: str, outcome: Outcome) -> None:
        """Count an HTTP request; `route` is a path's template."""
        self._requests.labels(route, outcome).inc()

    def first_token(self, seconds: float, usage: Usage) -> None:
        (self._cached if is_cached(usage) else self._computed).observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def choice(self, finish_reason: str) -> None:
        """Count a choice that has ended by itself."""
        self._finished.labels(finish_reason).inc()

    def ended(self, timing: Timing, arrived: float) -> None:
        """Note the times of a prompt whose choices have all ended by themselves."""
        if timing.started is None or timing.first_token is None or timing.ended is None:
            return
        self._whole.observe(timing.ended - arrived)
        self._queue.observe(timing.started - timing.submitted)
        self._prefill.observe(timing.first_token - timing.started)
        self._decode.observe(timing.ended - timing.first_token)

    async def serve(self, request: Request) -> Response:
        """GET and HEAD /metrics, as OpenMetrics for those who ask for it."""
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(self.registry), headers={"Content-Type": content_type})

    def _seconds(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"stemcache_{name}_seconds", what, buckets=buckets, registry=self.registry)


class EngineCollector(Collector):
    """The engine's own counts, read when Prometheus comes, without waiting for the running step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        return iter(())  # else the registry would collect once just to learn the names

    def collect(self) -> Iterator[Metric]:
        now = self._engine.activity()
        yield GaugeMetricFamily("stemcache_num_requests_running", "Sequences that hold slots.", now.running)
        yield GaugeMetricFamily("stemcache_num_requests_waiting", "Sequences that wait for their turn.", now.waiting)
        for name, what, value in (
            ("num_preemptions", "Times that a sequence gave its slots to an older one.", now.preemptions),
            ("prompt_tokens", "Tokens of the prompts that were started.", now.prompt_tokens),
            ("generation_tokens", "Tokens that were generated.", now.generated_tokens),
            ("moved_tokens", "Prompt tokens that were moved to their places and not computed.", now.moved_tokens),
            ("prefix_cache_queries_tokens", "Prompt tokens that were looked up in the cache.", now.prompt_tokens),
        ):
            yield CounterMetricFamily(f"stemcache_{name}", what, value)
        evicted = now.pool.evicted_chunks
        for name, what, value in (
            ("cached_tokens", "Prompt tokens that were found in the cache, by where they lay.", now.cached_tokens),
            ("evicted_chunks", "Chunks that made room for others.", evicted),
            ("evicted_tokens", "Tokens of the chunks that made room for others.", evicted * now.pool.chunk_tokens),
        ):
            family = CounterMetricFamily(f"stemcache_{name}", what, labels=["tier"])
            family.add_metric(["device"], value)
            yield family
        pool = GaugeMetricFamily("stemcache_pool_chunks", "Chunks of the pool, by their state.", labels=["state"])
        pool.add_metric(["free"], now.pool.free_chunks)
        pool.add_metric(["cached"], now.pool.cached_chunks)
        pool.add_metric(["private"], now.pool.private_chunks)
        yield pool
        yield from cold_metrics(self._engine.cold_stats())
