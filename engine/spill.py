"""Spilling: which chunks go from the device to which tier, and when.

Invariant: the engine's thread copies chunks out and goes on; it never waits for a tier (`WriteBehind` does).

    device --evicted--> host --evicted--> cold       the last arrow with the policy write-back only
    device --published, or used again--> cold        with the other two
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Final

from stemcache.engine.write_behind import Write, WriteBehind
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


class Spiller:
    """Told by the store what happens to chunks, it decides what becomes of them below. Belongs to the engine's thread.

    Attributes:
        writes: what waits to be written. below: what left the device for a tier.
        restoring: what is published now came from a tier.
        keeps_out: whose chunks must not be copied.
    """

    def __init__(
        self,
        pool: KVPool,
        group: int,
        codec: Codec,
        secret: bytes | None,
        host: HostTier | None,
        cold: Tier | None,
        policy: ColdPolicy,
    ) -> None:
        self._pool, self._group, self._codec = pool, group, codec
        self._host, self._cold, self._policy = host, cold, policy
        self.writes = WriteBehind(host, cold, secret)
        self.below = ChunksBelow()
        self.restoring = False
        self.keeps_out: Callable[[Namespace], bool] = lambda namespace: False
        self._lost: deque[bytes] = deque()  # digests that name objects which no tier has any more
        self._touched: OrderedDict[bytes, float] = OrderedDict()

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
            self.writes.put(keys)

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
        while self.writes.refused:
            refused = self.writes.refused.popleft()
            if not refused.to_host and refused.node is not None:
                refused.node.is_cold = False
            in_host = self._host is not None and refused.key in self._host
            if not in_host and (refused.node is None or not self._has_own(refused.node)):
                self._lost.append(digest_of(refused.key))
        while self._lost:
            self.below.lost(self._lost.popleft(), self._group)

    def flush(self, nodes: Iterable[Node], deadline: float) -> None:
        """Write what only device or host have, as an engine ends. `nodes`: all of them, parents before children."""
        if self._cold is None or self._policy is not ColdPolicy.WRITE_BACK:
            return
        for node in nodes:
            if node.parent is not None and not node.is_cold and (node.depth % self._group == 0 or not node.children):
                if not self.writes.wait_for_room(deadline):
                    return
                self._to_cold(node)
        for key, value in self._host.newest_first() if self._host is not None else ():
            self.writes.put(Write(key, to_host=False, value=value), always=True)

    # -- any thread --------------------------------------------------------------------------------------------------

    def host_evicted(self, key: bytes, value: Value) -> None:
        """Note that host memory gave an object up."""
        # With another policy it went to the cold tier before, or is not wanted there.
        writes = self._cold is not None and self._policy is ColdPolicy.WRITE_BACK
        if writes and self.writes.put(Write(key, to_host=False, value=value)):
            return
        if writes or self._cold is None:
            self._lost.append(digest_of(key))

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
        if not self.writes.has_room:  # before anything is copied
            self.writes.dropped += 1
            return False
        return self.writes.put(self._write_of(node, to_host=to_host))

    def _write_of(self, node: Node, *, to_host: bool) -> Write:
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
        return Write(_key(node), to_host, _key(before) if before.parent is not None else None, node, draft, copies)


def _key(node: Node) -> bytes:
    return tier_key(node.root.key, node.digest)
