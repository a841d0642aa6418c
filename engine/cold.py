"""The tiers below the device pool, as the engine sees them: one object that spills, restores, forgets and counts.

Invariant: without tiers it does nothing and costs nothing; with tiers that fail it does no more than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from stemcache.engine.cost import CostSurface
from stemcache.engine.load_cost import LoadCost
from stemcache.engine.restoration import LoadBudget, RestoreCounters
from stemcache.engine.restore import Restorer
from stemcache.engine.sequence import Sequence
from stemcache.engine.spill import ColdPolicy, Spiller
from stemcache.prefixtree.chunk_frames import group_chunks
from stemcache.prefixtree.codecs.registry import get_codec
from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.store import PrefixStore
from stemcache.prefixtree.tiers.host import HostTier
from stemcache.prefixtree.tiers.open import open_tier
from stemcache.prefixtree.tiers.tier import Tier, TierStats, namespace_prefix

FLUSH_SECONDS: Final = 20.0
"""Time for an engine that is closed to write what only it has."""


@dataclass(frozen=True, slots=True)
class ColdOptions:
    """What lies below the device pool.

    cold: "off", "disk", "disk:///folder", or a Redis address (see stemcache.prefixtree.tiers.address).
    host_bytes: host memory for chunks that the device evicts; 0 for none.
    cold_bytes: what the disk's files may grow to. A Redis server has its own limit.
    codec: how chunks are stored; a lossy one changes answers, and has a namespace of its own.
    password: of the Redis server, where its address has none.
    secret: seals what is stored, against whoever can write to the tier.
    """

    cold: str = "off"
    host_bytes: int = 0
    cold_bytes: int = 10 << 30
    policy: ColdPolicy = ColdPolicy.WRITE_THROUGH
    codec: str = "raw"
    budget: LoadBudget = field(default_factory=LoadBudget)
    password: str | None = None
    secret: bytes | None = None

    @property
    def is_off(self) -> bool:
        return self.cold == "off" and not self.host_bytes


@dataclass(frozen=True, slots=True)
class ColdStats:
    """A snapshot of the tiers, fastest first, and of what moves between them and the device."""

    tiers: tuple[TierStats, ...]
    restored: RestoreCounters
    pending_bytes: int
    dropped_writes: int
    failed_writes: int
    warnings: tuple[str, ...]


class ColdCache:
    """Made by the engine; `attach` ties it to the store. Methods are for the engine's thread unless they say more."""

    def __init__(self, pool: KVPool, options: ColdOptions, surface: CostSurface) -> None:
        """surface: what computing costs. Raises TierError for an address, a folder or a codec that cannot be used."""
        self._pool, self._options = pool, options
        try:
            self.codec = get_codec(options.codec)
        except ValueError as error:
            raise TierError(str(error)) from None
        self.group = group_chunks(pool.layout.bytes_per_chunk)
        self.cold: Tier | None = None
        if options.cold != "off":
            self.cold = open_tier(options.cold, max_bytes=options.cold_bytes, password=options.password)
        self.host = HostTier(options.host_bytes, self._host_evicted) if options.host_bytes else None
        found: tuple[Tier | None, ...] = (self.host, self.cold)
        self.tiers = [tier for tier in found if tier is not None]
        self.spiller = Spiller(
            pool, self.group, self.codec, options.secret, self.host, self.cold, ColdPolicy(options.policy)
        )
        self.cost = LoadCost(pool.layout.bytes_per_token, surface)
        self._restorer: Restorer | None = None

    def attach(self, store: PrefixStore, post: Callable[[Callable[[], None]], None]) -> None:
        """Begin to serve a store. post: hands a function to the engine's thread."""
        self._restorer = Restorer(
            store,
            self._pool,
            self.tiers,
            self.group,
            self.codec,
            self._options.secret,
            post=post,
            restoring=self._set_restoring,
            cost=self.cost,
            budget=self._options.budget,
        )

    @property
    def namespace_fields(self) -> dict[str, str | int]:
        """What of the tiers decides a chunk's numbers, or what a key of theirs stands for."""
        if self._options.is_off:
            return {}
        # An exact codec changes no number, but servers with other ones would refuse and delete each other's objects.
        return {"group": self.group, "codec": self.codec.name}

    @property
    def restorer(self) -> Restorer:
        assert self._restorer is not None, "the tiers serve no store yet"
        return self._restorer

    def look_ahead(self, waiting: Iterator[Sequence]) -> None:
        """End what has taken too long, and begin to load what waiting sequences need."""
        self.restorer.expire()
        self.restorer.look_ahead(waiting)

    def flush(self, chunks: Iterable[Node]) -> None:
        """At the end: stop loading, and write what only the device has. `chunks`: parents before children."""
        self.restorer.close()
        self.spiller.flush(chunks, time.monotonic() + FLUSH_SECONDS)

    # -- any thread --------------------------------------------------------------------------------------------------

    def forget(self, namespace: Namespace) -> None:
        """Delete everything of a namespace from all tiers. May take seconds.

        The caller has blocked the namespace (`Restorer.block`) and cleared the device. Raises TierError if a tier did
        not answer, when the others have been cleared.
        """
        prefix = namespace_prefix(namespace.digest)
        silent = []
        for tier in self.tiers:
            # Before each: what a tier gives up while it is cleared is on its way to the next.
            self.spiller.writes.forget(lambda key: key.startswith(prefix))
            if not tier.delete_namespace(namespace.digest):
                silent.append(tier.name)
        if silent:
            names = " and the ".join(silent)
            raise TierError(
                f"the {names} tier did not answer: what it holds is still there, until it answers and is asked again"
            )

    def stats(self) -> ColdStats:
        """Does not wait for the engine. A disk's numbers are read from its file."""
        return ColdStats(
            tiers=tuple(tier.stats() for tier in self.tiers),
            restored=self.restorer.counters,
            pending_bytes=self.spiller.writes.pending_bytes,
            dropped_writes=self.spiller.writes.dropped,
            failed_writes=self.spiller.writes.failures,
            warnings=tuple(getattr(self.cold, "warnings", ())),
        )

    def close(self) -> None:
        """Write what waits to be written, and let go of the tiers; idempotent. The engine's thread has ended."""
        self.spiller.writes.close(FLUSH_SECONDS)
        for tier in self.tiers:
            tier.close()

    def _host_evicted(self, key: bytes, value: bytes | bytearray | memoryview) -> None:
        self.spiller.host_evicted(key, value)

    def _set_restoring(self, restoring: bool) -> None:
        self.spiller.restoring = restoring
