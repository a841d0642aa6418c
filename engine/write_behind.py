"""Writing behind: objects that wait for a tier, and the threads that hand them over.

Invariants: what waits is bounded, and what does not fit is dropped, for an object that is lost is a miss and nothing
worse. When `forget` returns, no write that was under way brings back what was forgotten.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from stemcache.prefixtree.chunk_frames import ChunkDraft
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.tiers.host import HostTier
from stemcache.prefixtree.tiers.tier import Tier, Value

log = logging.getLogger(__name__)

WRITERS: Final = 2
MAX_PENDING_BYTES: Final = 256 << 20
STORE_SECONDS: Final = 5.0


@dataclass(eq=False, slots=True)
class Write:
    """An object to be written: a packed `value`, or a `draft` whose bytes are there once the `copies` have ended.

    node: the one that names it, None where the device no longer knows it. parent: the key of the object before it.
    """

    key: bytes
    to_host: bool
    parent: bytes | None = None
    node: Node | None = None
    draft: ChunkDraft | None = None
    copies: Sequence[Callable[[], None]] = ()
    value: Value | None = None
    cancelled: bool = False

    @property
    def n_bytes(self) -> int:
        return (self.draft.n_bytes if self.draft else 0) + (len(self.value) if self.value else 0)


@dataclass(frozen=True, slots=True)
class Refused:
    """A write that a tier did not keep, without its bytes: many may wait to be taken in while a tier is down."""

    key: bytes
    to_host: bool
    node: Node | None


class WriteBehind:
    """A queue of writes, and of paths to be touched, and its threads. Methods may be called from any thread.

    Attributes:
        max_pending_bytes, pending_bytes: of what may wait, and waits or is under way.
        dropped, failures: writes that found no room, and those that a tier, or the codec, failed at.
        refused: what a tier did not keep, for whoever queued it to take out.
    """

    def __init__(self, host: HostTier | None, cold: Tier | None, secret: bytes | None) -> None:
        self._host, self._cold, self._secret = host, cold, secret
        self.max_pending_bytes = MAX_PENDING_BYTES
        self.pending_bytes = self.dropped = self.failures = 0
        self.refused: deque[Refused] = deque()
        self._changed = threading.Condition()
        self._queue: deque[Write | Sequence[bytes]] = deque()
        self._running: set[Write] = set()
        self._closed = False
        n_writers = WRITERS if host is not None or cold is not None else 0
        self._threads = [
            threading.Thread(target=self._work, name=f"stemcache-spill-{i}", daemon=True) for i in range(n_writers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_room(self) -> bool:
        return self.pending_bytes < self.max_pending_bytes

    def wait_for_room(self, deadline: float) -> bool:
        """Wait until something more may be queued; False if it takes longer than to `deadline` (time.monotonic)."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_room, deadline - time.monotonic())

    def put(self, item: Write | Sequence[bytes], *, always: bool = False) -> bool:
        """Queue a write, or a path's keys to be touched; False if there is no room. always: though there is none."""
        with self._changed:
            if self._closed or not self._threads or not (always or self.has_room):
                self.dropped += 1
                return False
            self._queue.append(item)
            if isinstance(item, Write):
                self.pending_bytes += item.n_bytes
            self._changed.notify()
        return True

    def forget(self, match: Callable[[bytes], bool]) -> None:
        """Cancel all writes of keys that `match`, and return when none is under way."""
        with self._changed:
            for write in [each for each in self._queue if isinstance(each, Write) and match(each.key)]:
                self._queue.remove(write)
                self.pending_bytes -= write.n_bytes
            for write in self._running:
                write.cancelled |= match(write.key)
            self._changed.wait_for(lambda: not any(match(write.key) for write in self._running))

    def drain(self, seconds: float) -> bool:
        """Wait until everything is written; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._running, seconds)

    def close(self, seconds: float) -> None:
        """Write what waits, for so long, and end the threads; idempotent."""
        self.drain(seconds)
        with self._changed:
            self._closed = True
            self._queue.clear()
            self.pending_bytes = 0
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                item = self._queue.popleft()
                if isinstance(item, Write):
                    self._running.add(item)
            try:
                self._write(item) if isinstance(item, Write) else self._touch(item)
            except Exception:  # a tier or a codec with a bug: the object is lost, the thread is not
                log.exception("a chunk could not be written to a tier")
                self.failures += 1
            finally:
                with self._changed:
                    if isinstance(item, Write):
                        self._running.discard(item)
                        self.pending_bytes = max(0, self.pending_bytes - item.n_bytes)
                    self._changed.notify_all()

    def _touch(self, keys: Sequence[bytes]) -> None:
        for tier in (self._host, self._cold):
            if tier is not None:
                tier.touch(keys)

    def _write(self, write: Write) -> None:
        value = write.value
        if value is None:
            assert write.draft is not None
            for finish in write.copies:
                finish()
            value = write.draft.pack(self._secret)
        if write.cancelled:
            return
        deadline = time.monotonic() + STORE_SECONDS
        if write.to_host:
            assert self._host is not None
            refusal = self._host.store(write.key, value, deadline, parent=write.parent)
        elif self._cold is not None:
            refusal = self._cold.store(write.key, value, deadline)
            self.failures += refusal is not None
        else:
            return
        if refusal is not None:
            self.refused.append(Refused(write.key, write.to_host, write.node))
