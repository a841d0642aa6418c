"""The memory of evicted chunks: names only, so that a miss can be told from a loss.

Invariant: what is remembered, together with what is cached, is closed under prefixes. A chunk is evicted after its
children and remembered for as long as the latest of them at least, so if it is forgotten, so are they.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from stemcache.prefixtree.node import chain_digest

# At about 200 bytes each that is 13 MB, for four million tokens in chunks of 64.
MAX_REMEMBERED: Final = 1 << 16


class EvictedChunks:
    """The `limit` chunks evicted last, by `Node.digest`."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._digests)

    def remember(self, digest: bytes) -> None:
        """Note a chunk that was just evicted. O(1)."""
        self._digests[digest] = None
        self._digests.move_to_end(digest)
        if len(self._digests) > self._limit:
            self._digests.popitem(last=False)

    def count_run(self, parent: bytes, keys: Iterable[bytes]) -> int:
        """Return how many of the chunks `keys`, which follow each other after the path named `parent`, were evicted.

        Counts to the first that was not; what follows it was not either (see the invariant). O(answer + 1).
        """
        n_chunks = 0
        for key in keys if self._digests else ():
            parent = chain_digest(parent, key)
            if parent not in self._digests:
                break
            n_chunks += 1
        return n_chunks
