"""The tier protocol: exact bytes for a key, or a miss, in time.

Invariant, for whatever happens to the medium: `load` gives bytes that some `store` was given for that key or a `Miss`,
and is back by its deadline; no method but a constructor raises. A tier does not look into its values: what it returns
may have been damaged on the medium, and frames (stemcache.prefixtree.frame) are what finds that out.

Methods may be called from any thread. Deadlines are absolute, in seconds of `time.monotonic`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

Value = bytes | bytearray | memoryview

_NAMESPACE_BYTES: Final = 16
KEY_BYTES: Final = _NAMESPACE_BYTES + 32

# Upper bounds of the load-time histogram, in seconds; the last bucket is open.
LOAD_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


def tier_key(namespace: bytes, digest: bytes) -> bytes:
    """Return the key of an object: what its namespace begins with, and the digest of its last chunk.

    The digest alone names the object, since the chain begins with the namespace. The first part is there so that a
    namespace's objects stand together, and can be listed and deleted without an index.
    """
    return namespace_prefix(namespace) + digest


def digest_of(key: bytes) -> bytes:
    """Return the digest that a key ends with: the name of the object's last chunk."""
    return key[_NAMESPACE_BYTES:]


def namespace_prefix(namespace: bytes) -> bytes:
    """Return what all keys of a namespace (its 32-byte digest) begin with."""
    return namespace[:_NAMESPACE_BYTES]


class Miss(StrEnum):
    """Why a tier has no bytes to give."""

    ABSENT = "absent"
    DEADLINE = "deadline"
    """They did not arrive in time."""
    UNAVAILABLE = "unavailable"
    """The medium failed, or is left in peace because it failed a moment ago."""


class Refusal(StrEnum):
    """Why a tier did not keep what it was given."""

    TOO_LARGE = "too_large"
    FULL = "full"
    DEADLINE = "deadline"
    UNAVAILABLE = "unavailable"


@dataclass(slots=True)
class TierCounters:
    """What happened since the tier was opened. Only ever counted up, by any thread, under `lock`."""

    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    stores: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    evictions: int = 0
    deletions: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    load_seconds: float = 0.0
    load_times: list[int] = field(default_factory=lambda: [0] * (len(LOAD_SECONDS) + 1))
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def loaded(self, n_bytes: int, seconds: float) -> None:
        with self.lock:
            self.hits += 1
            self.loaded_bytes += n_bytes
            self.load_seconds += seconds
            self.load_times[bisect_left(LOAD_SECONDS, seconds)] += 1

    def missed(self, reason: str, n: int = 1) -> None:
        with self.lock:
            self.misses[reason] += n

    def stored(self, n_bytes: int) -> None:
        with self.lock:
            self.stores += 1
            self.stored_bytes += n_bytes

    def refused(self, reason: str) -> None:
        with self.lock:
            self.refusals[reason] += 1


@dataclass(frozen=True, slots=True)
class TierStats:
    """A snapshot of one tier. `objects`, `bytes` and `max_bytes` are None where the tier cannot know them cheaply.

    `bytes` counts values, not what the medium needs besides. `is_available`: False while it is left in peace.
    `trouble`: what it last failed with, in a sentence; None if all is well.
    """

    name: str
    is_available: bool
    objects: int | None
    bytes: int | None
    max_bytes: int | None
    hits: int
    misses: dict[str, int]
    stores: int
    refusals: dict[str, int]
    evictions: int
    deletions: int
    loaded_bytes: int
    stored_bytes: int
    load_seconds: float
    load_times: tuple[int, ...]
    trouble: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        counters: TierCounters,
        *,
        is_available: bool = True,
        objects: int | None = None,
        n_bytes: int | None = None,
        max_bytes: int | None = None,
        trouble: str | None = None,
    ) -> TierStats:
        with counters.lock:
            return cls(
                name=name,
                is_available=is_available,
                objects=objects,
                bytes=n_bytes,
                max_bytes=max_bytes,
                hits=counters.hits,
                misses=dict(counters.misses),
                stores=counters.stores,
                refusals=dict(counters.refusals),
                evictions=counters.evictions,
                deletions=counters.deletions,
                loaded_bytes=counters.loaded_bytes,
                stored_bytes=counters.stored_bytes,
                load_seconds=counters.load_seconds,
                load_times=tuple(counters.load_times),
                trouble=trouble,
            )


class Tier(Protocol):
    """What the engine asks of a tier. `name` is its label in metrics; `counters` may be added to by its users."""

    name: str
    counters: TierCounters

    def lookup(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        """Return which keys are there, as far as can be told in time. A hint: `load` may still miss.

        Changes nothing, recency included. All False where the medium fails.
        """
        ...

    def load(self, keys: Sequence[bytes], deadline: float) -> list[Value | Miss]:
        """Return each key's bytes or why there are none, counted as hits and misses. Deletes nothing.

        The deadline is for all of it: what has not arrived whole by then is a miss.
        """
        ...

    def reading(self, key: bytes, deadline: float) -> AbstractContextManager[Value | Miss]:
        """Lend one key's bytes for the length of a `with` block, or say why there are none; counted as `load` counts.

        Uncopied where the medium allows it. Within the block nobody changes them, whatever is evicted or deleted; after
        it they are another's, and nothing may refer to them. Do not close the tier inside.
        """
        ...

    def store(self, key: bytes, value: Value, deadline: float) -> Refusal | None:
        """Keep `value`, evicting others where room is short; None when it is there, whole, else why it is not.

        Keys name their contents, so an older value under the same key is as good, and may be kept instead.
        """
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """Note a use of the chunks of one path, given leaf to root, so that the root goes last. May be done later."""
        ...

    def delete(self, keys: Iterable[bytes]) -> bool:
        """Forget objects; True when none of them can be found here any more, False if the medium did not answer."""
        ...

    def delete_namespace(self, namespace: bytes) -> bool:
        """Forget all objects of a namespace, named by its digest; True and False as `delete`. O(its objects) at least.

        For people and for documents that are withdrawn, not for the path of a request.
        """
        ...

    def scan(self, namespace: bytes | None = None) -> Iterator[tuple[bytes, int]]:
        """Yield keys with the sizes of their values, of one namespace or of all; for administration.

        Raises:
            TierError: the medium does not answer.
        """
        ...

    def stats(self) -> TierStats: ...

    def close(self) -> None:
        """Let go of the medium; idempotent. Later calls find nothing and store nothing."""
        ...
