"""The error tree of stemcache. Every error that is ours descends from `StemcacheError`.

    StemcacheError
    ├── StoreError                 prefixtree
    │   ├── CapacityError          the pool cannot hold what was asked for, even after eviction
    │   └── InvariantError         `check()` found the store inconsistent: a bug of ours
    └── EngineError                engine (stemcache.engine.errors draws this branch)

A caller's mistake raises; `assert` is only for what we promise ourselves.
"""

from __future__ import annotations


class StemcacheError(Exception):
    """Base of every error that stemcache raises on purpose."""


class StoreError(StemcacheError):
    """The prefix store could not do what it was asked to."""


class CapacityError(StoreError):
    """The pool has too few free or evictable slots. The message names how many were needed and how many there are."""


class InvariantError(StoreError):
    """The store's own bookkeeping is inconsistent; the message names the first broken invariant."""
