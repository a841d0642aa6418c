"""The queue behind the engine: what a tier refuses is told without its bytes, and what does not fit is dropped."""

from __future__ import annotations

import gc
import weakref

from stemcache.engine.write_behind import Refused, Write, WriteBehind
from stemcache.prefixtree.tiers.host import HostTier


class Bytes(bytearray):
    """Bytes that can be watched."""


def test_what_a_tier_refuses_holds_no_memory() -> None:
    host = HostTier(100)
    writes = WriteBehind(host, None, None)
    large, small = Bytes(101), Bytes(100)
    gone = weakref.ref(large)
    assert writes.put(Write(b"large", to_host=True, value=large))
    assert writes.put(Write(b"small", to_host=True, value=small))
    del large
    writes.close(30)
    gc.collect()
    assert list(writes.refused) == [Refused(b"large", True, None)]
    assert gone() is None
    assert b"small" in host
    assert writes.pending_bytes == 0


def test_without_room_nothing_is_queued_unless_it_must_be() -> None:
    host = HostTier(100)
    writes = WriteBehind(host, None, None)
    writes.max_pending_bytes = 0
    assert not writes.put(Write(b"a", to_host=True, value=b"1"))
    assert writes.put(Write(b"b", to_host=True, value=b"2"), always=True)
    writes.close(30)
    assert not writes.put(Write(b"c", to_host=True, value=b"3"), always=True), "it is closed"
    assert (b"a" in host, b"b" in host, b"c" in host) == (False, True, False)
    assert writes.dropped == 2
