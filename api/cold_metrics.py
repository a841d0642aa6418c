"""The tiers below the device in /metrics and in /v1/cache/stats.

Invariant: labels are names of tiers and reasons that this program made up; nothing of a key or an address is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from stemcache.prefixtree.tiers.tier import LOAD_SECONDS, TierStats

if TYPE_CHECKING:
    from stemcache.engine.cold import ColdStats

_COUNTERS = (
    ("hits", "Objects that were found and loaded."),
    ("stores", "Objects that were stored."),
    ("evictions", "Objects that this process removed to make room; a Redis server counts its own."),
    ("deletions", "Objects that were deleted because they were damaged, cleared or withdrawn."),
    ("loaded_bytes", "Bytes of the objects that were loaded."),
    ("stored_bytes", "Bytes of the objects that were stored."),
)


def cold_metrics(stats: ColdStats) -> Iterator[Metric]:
    """The families of all tiers; none without tiers."""
    if not stats.tiers:
        return
    yield _gauge("up", "1 while the tier can be used, 0 while it is left in peace.", stats, lambda t: t.is_available)
    yield _gauge("objects", "Objects in the tier, where it can tell.", stats, lambda t: t.objects)
    yield _gauge("bytes", "Bytes of the objects in the tier, where it can tell.", stats, lambda t: t.bytes)
    yield _gauge("max_bytes", "What the tier may hold, where it can tell.", stats, lambda t: t.max_bytes)
    for name, what in _COUNTERS:
        family = CounterMetricFamily(f"stemcache_tier_{name}", what, labels=["tier"])
        for tier in stats.tiers:
            family.add_metric([tier.name], getattr(tier, name))
        yield family
    yield _by_reason("misses", "Objects that could not be used, by reason.", stats, lambda t: t.misses)
    yield _by_reason("refusals", "Objects that were not stored, by reason.", stats, lambda t: t.refusals)
    times = HistogramMetricFamily("stemcache_tier_load_seconds", "Time to load one object.", labels=["tier"])
    for tier in stats.tiers:
        bounds = [str(bound) for bound in LOAD_SECONDS] + ["+Inf"]
        times.add_metric([tier.name], list(zip(bounds, accumulate(tier.load_times), strict=True)), tier.load_seconds)
    yield times
    yield from _moves(stats)


def _moves(stats: ColdStats) -> Iterator[Metric]:
    """What moves between the device and the tiers."""
    restored = stats.restored
    tokens = CounterMetricFamily(
        "stemcache_restored_tokens", "Prompt tokens that were loaded from a tier to the device.", labels=["tier"]
    )
    for tier in stats.tiers:
        tokens.add_metric([tier.name], restored.tokens[tier.name])
    yield tokens
    ended = CounterMetricFamily("stemcache_restorations", "Searches for a prompt's chunks, by end.", labels=["outcome"])
    for how, count in sorted(restored.ended.items()):
        ended.add_metric([how], count)
    yield ended
    yield CounterMetricFamily(
        "stemcache_restoration_wait_seconds", "Time that prompts waited for chunks.", restored.waited
    )
    yield GaugeMetricFamily("stemcache_spill_pending_bytes", "Bytes that wait to be written.", stats.pending_bytes)
    yield CounterMetricFamily("stemcache_spill_dropped", "Writes that found no room to wait.", stats.dropped_writes)
    yield CounterMetricFamily("stemcache_spill_failed", "Writes that a tier did not take.", stats.failed_writes)


def cold_answer(stats: ColdStats) -> dict[str, dict[str, Any]]:
    """The tiers as GET /v1/cache/stats shows them, by name."""
    return {
        tier.name: {
            "available": tier.is_available,
            "objects": tier.objects,
            "bytes": {"total": tier.max_bytes, "cached": tier.bytes},
            "hits": tier.hits,
            "misses": dict(sorted(tier.misses.items())),
            "stores": tier.stores,
            "refusals": dict(sorted(tier.refusals.items())),
            "evictions": tier.evictions,
            "loaded_bytes": tier.loaded_bytes,
            "stored_bytes": tier.stored_bytes,
            "load_seconds": round(tier.load_seconds, 6),
            "restored_tokens": stats.restored.tokens[tier.name],
            "trouble": tier.trouble,
        }
        for tier in stats.tiers
    }


def _gauge(name: str, what: str, stats: ColdStats, value: Callable[[TierStats], int | None]) -> Metric:
    family = GaugeMetricFamily(f"stemcache_tier_{name}", what, labels=["tier"])
    for tier in stats.tiers:
        amount = value(tier)
        if amount is not None:
            family.add_metric([tier.name], amount)
    return family


def _by_reason(name: str, what: str, stats: ColdStats, counts: Callable[[TierStats], Mapping[str, int]]) -> Metric:
    family = CounterMetricFamily(f"stemcache_tier_{name}", what, labels=["tier", "reason"])
    for tier in stats.tiers:
        for reason, count in sorted(counts(tier).items()):
            family.add_metric([tier.name, reason], count)
    return family
