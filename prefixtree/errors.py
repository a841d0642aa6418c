"""The error tree of stemcache. Every error that is ours descends from `StemcacheError`.

    StemcacheError
    ├── StoreError                 prefixtree
    │   ├── CapacityError          the pool cannot hold what was asked for, even after eviction
    │   ├── FrameError             stored bytes are not what was asked for: a miss, with a reason
    │   ├── InvariantError         `check()` found the store inconsistent: a bug of ours
    │   └── TierError              a cold tier cannot be opened, or does not answer somebody who administers it
    └── EngineError                engine (stemcache.engine.errors draws this branch)

A caller's mistake raises; `assert` is only for what we promise ourselves.
"""

from __future__ import annotations

from typing import Literal

# Why stored bytes are refused; the label of a counter. Of these only `version_newer` may be somebody else's good data.
FrameReason = Literal[
    "truncated",  # shorter than it says
    "oversized",  # longer than it says
    "magic",  # not a frame at all
    "version_older",
    "version_newer",
    "digest",  # another chunk's frame
    "mac",  # sealed with another secret, with none, or where none is configured
    "checksum",  # damaged, or under a secret: not ours
    "header",  # its fields contradict each other
    "namespace",  # another model's, tenant's or policy's
    "codec",  # encoded otherwise than asked for
    "layout",  # another shape or dtype
    "payload",  # the codec cannot have made these bytes
]


class StemcacheError(Exception):
    """Base of every error that stemcache raises on purpose."""


class StoreError(StemcacheError):
    """The prefix store could not do what it was asked to."""


class CapacityError(StoreError):
    """The pool has too few free or evictable slots. The message names how many were needed and how many there are."""


class FrameError(StoreError):
    """Stored bytes are not a whole, undamaged frame of the chunk that was asked for. They count as a miss.

    The message never holds stored bytes.

    Attributes:
        reason: one word for a counter's label.
    """

    def __init__(self, reason: FrameReason, message: str) -> None:
        super().__init__(message)
        self.reason: FrameReason = reason


class InvariantError(StoreError):
    """The store's own bookkeeping is inconsistent; the message names the first broken invariant."""


class TierError(StoreError):
    """A cold tier cannot be used as asked: a bad address or folder, a missing library, no answer to a deletion.

    The message says what to do. Who generates never sees it: for a generation a tier that fails is a miss.
    """
