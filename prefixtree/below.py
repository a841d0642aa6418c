"""What lies only below: chunks that left the device after a tier below it was handed a copy of them.

Invariant: at most `limit` chunks are remembered, those evicted last, and each has a copy that was handed over and that
nobody is known to have lost. No tier is asked, so one may have lost it since without a word.

    object 1..4, named by 4       1 - 2 - 3 - 4        while 4 or 4' is remembered, so may be 1 to 3;
    object 1..4', named by 4'               \\ 4'       when both are lost, nothing holds 3 any more

An entry stays when its chunk is cached again: whoever draws passes over it. Rejected: to remove it then. That needs the
chunk's name, a hash, on the way of every request, and saves nothing: evicted again, the chunk is where it was before.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.runs import group_begin

# With chunks of 64 tokens about 900 bytes each: 15 MB for a million tokens. A picture shows 5,000 at most.
MAX_BELOW: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class _Entry:
    namespace: bytes
    parent: bytes
    key: bytes
    depth: int
    is_named: bool
    """Whether an object of its own was handed over, and not only one of a later chunk that holds this one as well."""


class ChunksBelow:
    """The `limit` chunks evicted last of those that a tier was handed. Tokens too: they are what a picture shows."""

    def __init__(self, limit: int = MAX_BELOW) -> None:
        self._limit = limit
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # by `Node.digest`, in the order of eviction
        self._children: dict[bytes, dict[bytes, float]] = {}  # by the parent's digest: key to time of last use

    def __len__(self) -> int:
        return len(self._entries)

    def remember(self, node: Node, *, is_named: bool) -> None:
        """Note a chunk that is being evicted, children before parents. O(1).

        is_named: whether an object that it names was handed over; if not, one of a chunk below it, in the same group.
        """
        assert node.parent is not None
        before = self._remove(node.digest)
        is_named = is_named or (before is not None and before.is_named)
        self._entries[node.digest] = _Entry(node.root.key, node.parent.digest, node.key, node.depth, is_named)
        self._children.setdefault(node.parent.digest, {})[node.key] = node.used
        if len(self._entries) > self._limit:
            self._remove(next(iter(self._entries)))

    def lost(self, digest: bytes, group: int) -> None:
        """Note that the object that a chunk names, the last one of up to `group` chunks, is kept by no tier.

        With it go those of its chunks that no other object is known to hold.
        """
        entry = self._remove(digest)
        while entry is not None and entry.depth != group_begin(entry.depth, group):
            above = self._entries.get(entry.parent)
            if above is None or above.is_named or entry.parent in self._children:
                return
            entry = self._remove(entry.parent)

    def forget(self, namespace: Namespace) -> None:
        """Drop all that is remembered of a namespace. O(len(self))."""
        for digest in [digest for digest, each in self._entries.items() if each.namespace == namespace.digest]:
            self._remove(digest)

    def children(self, parent: bytes) -> dict[bytes, float]:
        """Return the chunks remembered below the path named `parent`, the latest evicted last. Not to be changed.

        Key (encoded tokens) to the time of last use, on the monotonic clock.
        """
        return self._children.get(parent, {})

    def check(self) -> None:
        """Raise InvariantError unless the index of children is that of the entries, within the limit. For tests."""
        listed = {(parent, key) for parent, keys in self._children.items() for key in keys}
        if listed != {(each.parent, each.key) for each in self._entries.values()}:
            raise InvariantError("below: the children's index lists other chunks than are remembered")
        if len(listed) != len(self._entries) or len(listed) > self._limit or not all(self._children.values()):
            raise InvariantError("below: a chunk is remembered twice, too many are, or an empty list was kept")

    def _remove(self, digest: bytes) -> _Entry | None:
        entry = self._entries.pop(digest, None)
        if entry is not None:
            siblings = self._children[entry.parent]
            del siblings[entry.key]
            if not siblings:
                del self._children[entry.parent]
        return entry
