"""Pins: prefixes that stay cached because somebody asked for it, not because a request uses them.

Invariant: pins hold a bounded share of the pool, and only as long as they hurt nobody. A pin ends when it is removed,
when its time is over, or when a request could not run at all without its room. Touched by the engine's thread only.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from stemcache.engine.errors import InvalidRequestError
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.store import Lease, PrefixStore

MAX_SHARE: Final = 0.5
MAX_PINS: Final = 1024


@dataclass(frozen=True, slots=True)
class PinInfo:
    """A pin as its owner sees it. `expires_in` is in seconds; None: until it is removed."""

    id: str
    tokens: int
    expires_in: float | None


@dataclass(eq=False, slots=True)
class _Pin:
    lease: Lease
    namespace: Namespace
    expires_at: float | None


class Pins:
    """The pins on one store, oldest first.

    max_share: of the pool's chunks, how many pins may hold together. clock: seconds, never going back.
    """

    def __init__(
        self, store: PrefixStore, *, max_share: float = MAX_SHARE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._max_chunks = int(store.stats().total_chunks * max_share)
        self._clock = clock
        self._pins: dict[str, _Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    def require_room(self, tokens: Sequence[int], namespace: Namespace) -> None:
        """Raise InvalidRequestError unless the whole chunks of `tokens` may be pinned, cached or not."""
        self.expire()
        if len(self._pins) >= MAX_PINS:
            raise InvalidRequestError(f"there are {MAX_PINS} pins already: remove one first", code="pin_limit_exceeded")
        size = self._store.chunk_tokens
        n_chunks = len(tokens) // size
        if not n_chunks:
            raise InvalidRequestError(
                f"there is nothing to pin: the prompt has {len(tokens)} tokens, and chunks of {size} are kept",
                param="prompt",
            )
        held = self._held()
        with self._store.pin(tokens, namespace) as lease:
            missing = n_chunks - sum(node in held for node in lease.node.upward())
        if len(held) + missing > self._max_chunks:
            raise InvalidRequestError(
                f"this pin needs {missing} chunks; pins may hold {self._max_chunks} of the pool and hold {len(held)} "
                "already: remove a pin, pin less, or give the server a larger pool",
                code="pin_limit_exceeded",
            )

    def add(self, tokens: Sequence[int], namespace: Namespace, seconds: float | None) -> PinInfo:
        """Pin what is cached of `tokens`, in whole chunks, for so long or until it is removed.

        Raises InvalidRequestError as `require_room` does.
        """
        self.require_room(tokens, namespace)
        lease = self._store.pin(tokens, namespace)
        name = f"pin-{uuid.uuid4().hex}"
        self._pins[name] = _Pin(lease, namespace, None if seconds is None else self._clock() + seconds)
        return self._info(name)

    def remove(self, name: str, namespace: Namespace) -> bool:
        """End a pin; False if this namespace has none of that name."""
        self.expire()
        if name not in self._pins or self._pins[name].namespace != namespace:
            return False
        self._end(name)
        return True

    def of(self, namespace: Namespace) -> list[PinInfo]:
        """The pins of a namespace, oldest first."""
        self.expire()
        return [self._info(name) for name, pin in self._pins.items() if pin.namespace == namespace]

    def expire(self) -> None:
        """End the pins whose time is over. Cheap enough for every step."""
        if self._pins:
            now = self._clock()
            for name in [n for n, pin in self._pins.items() if pin.expires_at is not None and pin.expires_at <= now]:
                self._end(name)

    def give_way(self) -> bool:
        """End the oldest pin, because a request cannot run beside it; False if there is none."""
        for name in self._pins:
            self._end(name)
            return True
        return False

    def end_below(self, tops: Iterable[Node]) -> int:
        """End the pins that hold one of these chunks or one below; returns how many."""
        found = set(tops)
        names = [name for name, pin in self._pins.items() if not found.isdisjoint(pin.lease.node.upward())]
        for name in names:
            self._end(name)
        return len(names)

    def clear(self) -> None:
        """End all pins."""
        while self.give_way():
            pass

    def _end(self, name: str) -> None:
        self._pins.pop(name).lease.release(used=False)

    def _held(self) -> set[Node]:
        """The chunks that pins hold. O(their number)."""
        held: set[Node] = set()
        for pin in self._pins.values():
            for node in pin.lease.node.upward():
                if node in held:
                    break
                held.add(node)
        return held

    def _info(self, name: str) -> PinInfo:
        pin = self._pins[name]
        left = None if pin.expires_at is None else max(0.0, pin.expires_at - self._clock())
        return PinInfo(name, pin.lease.cached_tokens, left)
