"""Host memory as a tier: values in this process, the least recently used leaf goes first.

Invariant: the values' bytes never exceed `max_bytes`, and no object is evicted while one that follows it is here: so
what is found here is always a beginning of a path, and never the end of one whose beginning was dropped.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from stemcache.prefixtree.tiers.tier import Miss, Refusal, TierCounters, TierStats, Value, namespace_prefix

Evicted = Callable[[bytes, Value], None]


class HostTier:
    """A dictionary of at most `max_bytes` bytes of values.

    on_evict: called with each object that goes to make room, outside of the lock, on the thread that stores.
    """

    name = "host"

    def __init__(self, max_bytes: int, on_evict: Evicted | None = None) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        self.counters = TierCounters()
        self._max_bytes = max_bytes
        self._on_evict = on_evict
        self._lock = threading.Lock()
        self._values: OrderedDict[bytes, Value] = OrderedDict()  # the least recently used first
        self._parent: dict[bytes, bytes] = {}
        self._n_children: dict[bytes, int] = {}
        self._bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def lookup(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        return [key in self._values for key in keys]

    def load(self, keys: Sequence[bytes], deadline: float) -> list[Value | Miss]:
        loaded: list[Value | Miss] = []
        for key in keys:
            begin = time.monotonic()
            value = self._values.get(key)
            if value is None:
                self.counters.missed(Miss.ABSENT)
                loaded.append(Miss.ABSENT)
            else:
                self.counters.loaded(len(value), time.monotonic() - begin)
                loaded.append(value)
        return loaded

    def reading(self, key: bytes, deadline: float) -> AbstractContextManager[Value | Miss]:
        return nullcontext(self.load([key], deadline)[0])

    def store(self, key: bytes, value: Value, deadline: float, *, parent: bytes | None = None) -> Refusal | None:
        """As in `Tier`. parent: the key of the object before this one, which then outlives it here."""
        if len(value) > self._max_bytes:
            self.counters.refused(Refusal.TOO_LARGE)
            return Refusal.TOO_LARGE
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return None
            self._values[key] = value
            self._bytes += len(value)
            if parent is not None:
                self._parent[key] = parent
                self._n_children[parent] = self._n_children.get(parent, 0) + 1
            evicted = self._make_room(key)
        self.counters.stored(len(value))
        for victim, old in evicted:
            if self._on_evict is not None:
                self._on_evict(victim, old)
        return None

    def touch(self, keys: Sequence[bytes]) -> None:
        with self._lock:
            for key in keys:
                if key in self._values:
                    self._values.move_to_end(key)

    def delete(self, keys: Iterable[bytes]) -> bool:
        with self._lock:
            gone = [key for key in keys if self._remove(key) is not None]
        with self.counters.lock:
            self.counters.deletions += len(gone)
        return True

    def delete_namespace(self, namespace: bytes) -> bool:
        return self.delete([key for key, _ in self.scan(namespace)])

    def scan(self, namespace: bytes | None = None) -> Iterator[tuple[bytes, int]]:
        prefix = b"" if namespace is None else namespace_prefix(namespace)
        with self._lock:
            found = [(key, len(value)) for key, value in self._values.items() if key.startswith(prefix)]
        return iter(found)

    def newest_first(self) -> Iterator[tuple[bytes, Value]]:
        """Yield all objects, the most recently used first: roots before leaves."""
        with self._lock:
            found = list(reversed(self._values.items()))
        return iter(found)

    def parent_of(self, key: bytes) -> bytes | None:
        """Return the key that `store` was given as the parent of `key`."""
        return self._parent.get(key)

    def stats(self) -> TierStats:
        return TierStats.of(
            self.name, self.counters, objects=len(self._values), n_bytes=self._bytes, max_bytes=self._max_bytes
        )

    def close(self) -> None:
        with self._lock:
            self._values.clear()
            self._parent.clear()
            self._n_children.clear()
            self._bytes = 0
            self._max_bytes = 0

    def check(self) -> None:
        """Raise AssertionError unless the counts are those of what is here. For tests."""
        with self._lock:
            assert self._bytes == sum(map(len, self._values.values())) <= max(1, self._max_bytes)
            assert self._parent.keys() <= self._values.keys()
            counted: dict[bytes, int] = {}
            for parent in self._parent.values():
                counted[parent] = counted.get(parent, 0) + 1
            assert counted == self._n_children

    def _make_room(self, newcomer: bytes) -> list[tuple[bytes, Value]]:
        """Evict leaves until the limit holds, the newcomer last of all.

        Paths are touched leaf to root, so the oldest object is nearly always a leaf, and the search ends at once.
        """
        evicted: list[tuple[bytes, Value]] = []
        while self._bytes > self._max_bytes:
            leaves = (key for key in self._values if not self._n_children.get(key) and key != newcomer)
            victim = next(leaves, newcomer)
            value = self._remove(victim)
            assert value is not None
            evicted.append((victim, value))
        with self.counters.lock:
            self.counters.evictions += len(evicted)
        return evicted

    def _remove(self, key: bytes) -> Value | None:
        value = self._values.pop(key, None)
        if value is None:
            return None
        self._bytes -= len(value)
        parent = self._parent.pop(key, None)
        if parent is not None:
            self._n_children[parent] -= 1
            if not self._n_children[parent]:
                del self._n_children[parent]
        return value
