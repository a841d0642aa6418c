"""Spilling: chunks on their way from the device to the tiers, written behind the engine's back.

Invariants: the engine's thread copies chunks out and goes on, it never waits for a tier; what waits to be written is
bounded, and what does not fit is dropped, for a chunk that is lost is a miss and nothing worse. When `forget` returns,
no write that was under way brings back what was forgotten.

    device --evicted--> host --evicted--> cold       the last arrow with the policy write-back only
    device --published, or used again--> cold        with the other two
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from stemcache.prefixtree.below import ChunksBelow
from stemcache.prefixtree.chunk_frames import ChunkDraft
from stemcache.prefixtree.codecs.codec import Codec
from stemcache.prefixtree.frame import FrameHeader
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.runs import nodes_of_run
from stemcache.prefixtree.tiers.host import HostTier
from stemcache.prefixtree.tiers.tier import Tier, Value, digest_of, tier_key

log = logging.getLogger(__name__)

WRITERS: Final = 2
MAX_PENDING_BYTES: Final = 256 << 20
STORE_SECONDS: Final = 5.0
TOUCH_EVERY: Final = 30.0
"""Seconds in which a path's uses are told to the tiers once."""
_MAX_TOUCHED: Final = 4096


class ColdPolicy(StrEnum):
    """When a chunk goes to the cold tier. (To host memory it goes when the device evicts it.)"""

    WRITE_BACK = "write-back"
    """When the faster tiers have no room for it, or the engine is closed. The fewest writes; a crash loses most."""
    WRITE_THROUGH = "write-through"
    """When it is computed. A crash loses nothing."""
    SECOND_USE = "write-through-on-second-use"
    """When a second request needs it: what is read once is never written."""


@dataclass(eq=False, slots=True)
class _Write:
    """An object to be written: a packed `value`, or a `draft` whose bytes are there once the `copies` have ended."""

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


class Spiller:
    """The queue of objects to be written, and the threads that write them."""

    def __init__(
        self,
        pool: KVPool,
        group: int,
        codec: Codec,
        secret: bytes | None,
        host: HostTier | None,
        cold: Tier | None,
        policy: ColdPolicy,
        *,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self._pool, self._group, self._codec, self._secret = pool, group, codec, secret
        self._host, self._cold, self._policy = host, cold, policy
        self._max_pending_bytes = max_pending_bytes
        self.dropped = 0
        self.failures = 0
        self.pending_bytes = 0
        self.restoring = False  # what is published now came from a tier
        self.keeps_out: Callable[[Namespace], bool] = lambda namespace: False  # whose chunks must not be copied
        self.below = ChunksBelow()  # the engine's thread's
        self._unwritten: deque[Node] = deque()
        self._lost: deque[bytes] = deque()  # digests that name objects which no tier has any more
        self._touched: OrderedDict[bytes, float] = OrderedDict()
        self._changed = threading.Condition()
        self._queue: deque[_Write | Sequence[bytes]] = deque()
        self._running: set[_Write] = set()
        self._closed = False
        n_writers = WRITERS if host is not None or cold is not None else 0
        self._threads = [
            threading.Thread(target=self._work, name=f"stemcache-spill-{i}", daemon=True) for i in range(n_writers)
        ]
        for thread in self._threads:
            thread.start()

    # -- the engine's thread -----------------------------------------------------------------------------------------

    def published(self, node: Node) -> None:
        """Note that a chunk has joined the tree."""
        self.settle()
        if self.restoring:
            node.is_cold = True
            return
        if self._policy is ColdPolicy.WRITE_THROUGH and node.depth % self._group == 0:
            self._to_cold(node)
        parent = node.parent
        if parent is not None and parent.depth % self._group and len(parent.children) > 1:
            # Two paths part within a group: what they share becomes an object of its own, or a third would not find it.
            self._spill(parent) if self._host is not None else self._to_cold(parent)

    def used(self, node: Node) -> None:
        """Note that a request found the path down to `node`."""
        if self._policy is ColdPolicy.SECOND_USE:
            for each in node.upward():
                if each.is_cold:
                    break
                if each is node or each.depth % self._group == 0:
                    self._to_cold(each)

    def released(self, node: Node) -> None:
        """Note that a request that used the path down to `node` has ended."""
        if node.parent is None:
            return
        if self._policy is ColdPolicy.WRITE_THROUGH and node.depth % self._group:
            self._to_cold(node)
        now = time.monotonic()
        if now - self._touched.get(node.digest, -TOUCH_EVERY) >= TOUCH_EVERY:
            self._touched[node.digest] = now
            self._touched.move_to_end(node.digest)
            if len(self._touched) > _MAX_TOUCHED:
                self._touched.popitem(last=False)
            keys = [_key(each) for each in node.upward() if each is node or each.depth % self._group == 0]
            self._put(keys)

    def evicted(self, nodes: Iterable[Node]) -> None:
        """Note that chunks are about to lose their slots, children before parents."""
        self.settle()
        for node in nodes:
            in_another = node.is_covered and bool(self.below.children(node.digest)) and node.depth % self._group != 0
            is_named = self._has_own(node) if in_another else self._spill(node)
            if not (in_another or is_named):
                continue
            self.below.remember(node, is_named=is_named)
            parent = node.parent
            if parent is not None and parent.depth % self._group:
                parent.is_covered = True

    def settle(self) -> None:
        """Take in what the writers found out since: which objects were not kept."""
        while self._unwritten:
            self._unwritten.popleft().is_cold = False
        while self._lost:
            self.below.lost(self._lost.popleft(), self._group)

    def flush(self, nodes: Iterable[Node], deadline: float) -> None:
        """Write what only device or host have, as an engine ends. `nodes`: all of them, parents before children."""
        if self._cold is None or self._policy is not ColdPolicy.WRITE_BACK:
            return
        for node in nodes:
            if node.parent is not None and not node.is_cold and (node.depth % self._group == 0 or not node.children):
                with self._changed:
                    room = self._changed.wait_for(
                        lambda: self.pending_bytes < self._max_pending_bytes, deadline - time.monotonic()
                    )
                if not room:
                    return
                self._to_cold(node)
        for key, value in self._host.newest_first() if self._host is not None else ():
            self._put(_Write(key, to_host=False, value=value), always=True)

    # -- any thread --------------------------------------------------------------------------------------------------

    def forget(self, match: Callable[[bytes], bool]) -> None:
        """Cancel all writes of keys that `match`, and return when none is under way."""
        with self._changed:
            for write in [each for each in self._queue if isinstance(each, _Write) and match(each.key)]:
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

    # -- inside ------------------------------------------------------------------------------------------------------

    def _spill(self, node: Node) -> bool:
        """Copy the object that `node` names to the next tier; False if no tier has been handed it, now or before."""
        if self._host is None:
            if self._policy is not ColdPolicy.SECOND_USE:
                self._to_cold(node)
        elif _key(node) not in self._host and self._copy_out(node, to_host=True):
            return True
        return self._has_own(node)

    def _has_own(self, node: Node) -> bool:
        """Return whether a tier was handed an object that `node` names."""
        in_host = self._host is not None and _key(node) in self._host
        return in_host or (self._cold is not None and node.is_cold)

    def _to_cold(self, node: Node) -> None:
        if self._cold is not None and not node.is_cold:
            node.is_cold = self._copy_out(node, to_host=False)

    def _copy_out(self, node: Node, *, to_host: bool) -> bool:
        """Queue the object that `node` names, copied out of the pool; False if there is no room, or it must not be."""
        if self.keeps_out(Namespace(node.root.key)):
            return False
        if self.pending_bytes >= self._max_pending_bytes:
            self.dropped += 1
            return False
        return self._put(self._write_of(node, to_host=to_host))

    def _write_of(self, node: Node, *, to_host: bool) -> _Write:
        nodes = nodes_of_run(node, self._group)
        before = nodes[0].parent
        assert before is not None
        header = FrameHeader(
            codec=self._codec.name,
            layout=self._pool.layout,
            namespace=Namespace(node.root.key),
            parent=before.digest,
            tokens=b"".join(each.key for each in nodes),
        )
        draft = ChunkDraft(header, self._codec)
        copies = [self._pool.start_copy_out(each.slot, part) for each, part in zip(nodes, draft.parts, strict=True)]
        return _Write(_key(node), to_host, _key(before) if before.parent is not None else None, node, draft, copies)

    def _put(self, item: _Write | Sequence[bytes], *, always: bool = False) -> bool:
        """Queue a write, or a path's keys to be touched; False if there is no room."""
        with self._changed:
            if self._closed or not self._threads or not (always or self.pending_bytes < self._max_pending_bytes):
                self.dropped += 1
                return False
            self._queue.append(item)
            if isinstance(item, _Write):
                self.pending_bytes += item.n_bytes
            self._changed.notify()
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                item = self._queue.popleft()
                if isinstance(item, _Write):
                    self._running.add(item)
            try:
                self._do(item)
            except Exception:  # a tier or a codec with a bug: the chunk is lost, the thread is not
                log.exception("a chunk could not be written to a tier")
                self.failures += 1
            finally:
                with self._changed:
                    if isinstance(item, _Write):
                        self._running.discard(item)
                        self.pending_bytes = max(0, self.pending_bytes - item.n_bytes)
                    self._changed.notify_all()

    def _do(self, item: _Write | Sequence[bytes]) -> None:
        if not isinstance(item, _Write):
            for tier in (self._host, self._cold):
                if tier is not None:
                    tier.touch(item)
            return
        value = item.value
        if value is None:
            assert item.draft is not None
            for finish in item.copies:
                finish()
            value = item.draft.pack(self._secret)
        if item.cancelled:
            return
        deadline = time.monotonic() + STORE_SECONDS
        if item.to_host:
            assert self._host is not None
            assert item.node is not None
            refusal = self._host.store(item.key, value, deadline, parent=item.parent)
            if refusal is not None and not self._has_own(item.node):
                self._lost.append(digest_of(item.key))
        elif self._cold is not None:
            refusal = self._cold.store(item.key, value, deadline)
            if refusal is not None:
                self.failures += 1
                if item.node is not None:
                    self._unwritten.append(item.node)
                if self._host is None or item.key not in self._host:
                    self._lost.append(digest_of(item.key))

    def host_evicted(self, key: bytes, value: Value) -> None:
        """Note that host memory gave an object up."""
        # With another policy it went to the cold tier before, or is not wanted there.
        writes = self._cold is not None and self._policy is ColdPolicy.WRITE_BACK
        if writes and self._put(_Write(key, to_host=False, value=value)):
            return
        if writes or self._cold is None:
            self._lost.append(digest_of(key))


def _key(node: Node) -> bytes:
    return tier_key(node.root.key, node.digest)
