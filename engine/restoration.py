"""A restoration: one prompt's chunks on their way back from the tiers, how long they may take, what became of them.

Invariant: `objects` follow each other in the prompt, and those before `committed` are on the device.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from stemcache.engine.sequence import Sequence
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.runs import Run
from stemcache.prefixtree.shared_lock import SharedLock
from stemcache.prefixtree.store import Lease
from stemcache.prefixtree.tiers.tier import Tier


@dataclass(frozen=True, slots=True)
class LoadBudget:
    """How long a request may wait for its chunks, in seconds.

    Twice what the load is expected to take, but not longer than computing would take; and in any case between `least`,
    which a first connection needs, and `most`.
    """

    least: float = 0.05
    most: float = 2.0

    def seconds(self, load: float, compute: float) -> float:
        return min(self.most, max(self.least, min(2 * load, compute)))


@dataclass(slots=True)
class RestoreCounters:
    """What became of the restorations. Only ever counted up, but for the longest wait.

    ended: restorations by their end. tokens: loaded, by tier. waited: the seconds of all. overrun: the longest time in
    seconds by which one lasted longer than its budget: what the engine's running step took, for it is not interrupted.
    """

    ended: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    longest_wait: float = 0.0
    overrun: float = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """An object that a tier has: chunks `run.first` to `run.last` of the prompt."""

    run: Run
    key: bytes
    digest: bytes
    tier: Tier


@dataclass(eq=False, slots=True)
class Restoration:
    """One prompt's chunks that are being looked for.

    `writing` is shared by the threads that write into `slots`, and held alone to set `ended`: after that nobody writes.
    """

    sequence: Sequence
    namespace: Namespace
    tokens: list[int]
    lease: Lease
    begun: float
    deadline: float
    digests: list[bytes]  # of the chunks after those that are there
    depth: int  # chunks that were there when it began
    objects: list[Found] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # the lease's, when the loads began
    arrived: set[int] = field(default_factory=set)
    committed: int = 0  # objects
    loading_since: float | None = None
    last_arrival: float = 0.0
    writing: SharedLock = field(default_factory=SharedLock)
    ended: bool = False
