"""What the engine is doing, as anybody may read it at any moment.

Invariant: reading takes no lock and waits for nobody. Every number is right, but two of them may lie a moment apart;
`Engine.stats` waits for the running step and is consistent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stemcache.prefixtree.store import Occupancy, PrefixStore

if TYPE_CHECKING:
    from stemcache.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Activity:
    """Sequences running and waiting, and the pool's chunks; the others are totals since the engine was made.

    Who waits may not have come to the scheduler yet: requests are taken between two steps.
    `cached_tokens` of the `prompt_tokens` of all requests that started were not computed but found in the store, and
    `moved_tokens` of them were moved to their places.
    """

    running: int
    waiting: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    moved_tokens: int
    generated_tokens: int
    pool: Occupancy

    @classmethod
    def of(cls, scheduler: Scheduler, store: PrefixStore, *, arriving: int, generated_tokens: int) -> Activity:
        # Before those that run: a sequence that starts meanwhile is counted twice, never missed.
        waiting = arriving + len(scheduler.waiting)
        return cls(
            running=len(scheduler.running),
            waiting=waiting,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            moved_tokens=scheduler.moved_tokens,
            generated_tokens=generated_tokens,
            pool=store.occupancy(),
        )
