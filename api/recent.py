"""Recent requests: what the latest prompts of each tenant found in the cache, and when their answers began.

Invariant: bounded, whatever clients send, and of each tenant and salt apart, as their caches are. Used in the event
loop only.
"""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Final

from stemcache.engine.outputs import Usage

MAX_RECENT: Final = 200
MAX_OWNERS: Final = 1024


def is_cached(usage: Usage) -> bool:
    """Whether a request counts as cached: more than half of its prompt was found."""
    return 2 * usage.cached_tokens > usage.prompt_tokens


@dataclass(frozen=True, slots=True)
class RecentRequest:
    """One prompt. `number` counts those of its owner from 1; `at` on the clock; `seconds` to its first token."""

    number: int
    at: float
    usage: Usage
    seconds: float


@dataclass(slots=True)
class _Owner:
    """The latest requests of one tenant and salt, newest first."""

    latest: deque[RecentRequest] = field(default_factory=lambda: deque(maxlen=MAX_RECENT))
    numbers: count[int] = field(default_factory=lambda: count(1))


class RecentRequests:
    """The latest `MAX_RECENT` requests of each of the latest `MAX_OWNERS` owners."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._owners: OrderedDict[tuple[bytes, bytes], _Owner] = OrderedDict()

    def note(self, tenant: bytes, cache_salt: bytes, usage: Usage, seconds: float) -> None:
        """A prompt's first token has come, `seconds` after the request."""
        owner = self._owners.setdefault((tenant, cache_salt), _Owner())
        self._owners.move_to_end((tenant, cache_salt))
        if len(self._owners) > MAX_OWNERS:
            self._owners.popitem(last=False)
        owner.latest.appendleft(RecentRequest(next(owner.numbers), self._clock(), usage, seconds))

    def latest(self, limit: int, tenant: bytes, cache_salt: bytes) -> list[dict[str, Any]]:
        """The owner's requests as GET /v1/cache/requests tells them, newest first."""
        now = self._clock()
        return [
            {
                "number": each.number,
                "age_seconds": round(now - each.at, 3),
                "prompt_tokens": each.usage.prompt_tokens,
                "cached_tokens": each.usage.cached_tokens,
                "evicted_tokens": each.usage.evicted_tokens,
                "first_token_seconds": round(each.seconds, 6),
            }
            for each in islice(self._of(tenant, cache_salt), limit)
        ]

    def first_tokens(self, tenant: bytes, cache_salt: bytes) -> dict[str, Any]:
        """The owner's times to the first token, as GET /v1/cache/stats tells them."""
        times: dict[str, list[float]] = {"cached": [], "computed": []}
        for each in self._of(tenant, cache_salt):
            times["cached" if is_cached(each.usage) else "computed"].append(each.seconds)
        return {
            name: {
                "requests": len(seconds),
                "median_seconds": round(statistics.median(seconds), 6) if seconds else None,
            }
            for name, seconds in times.items()
        }

    def _of(self, tenant: bytes, cache_salt: bytes) -> deque[RecentRequest]:
        owner = self._owners.get((tenant, cache_salt))
        return deque() if owner is None else owner.latest
