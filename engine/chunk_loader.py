"""The chunk loader: an object of a tier into the slots of a restoration, on a thread that may wait for the tier.

Invariant: what it writes is whole and checked, and lands in slots that are the restoration's while it is written: its
end waits for copies in memory that are under way, and for nothing else; who comes later writes nothing.
"""

from __future__ import annotations

import logging
from typing import Final

from stemcache.engine.restoration import Found, Restoration
from stemcache.prefixtree.chunk_frames import unpack_bytes
from stemcache.prefixtree.codecs.codec import Codec
from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.runs import Run
from stemcache.prefixtree.tiers.tier import Miss

log = logging.getLogger(__name__)

_OTHERS: Final = frozenset({"version_newer"})  # refused, but not ours to delete: a newer program may still read it


class ChunkLoader:
    """Reads what `codec` and `secret` made of the chunks of `pool`. Any thread."""

    def __init__(self, pool: KVPool, codec: Codec, secret: bytes | None) -> None:
        self._pool, self._codec, self._secret = pool, codec, secret

    def load(self, restoration: Restoration, found: Found) -> bool:
        """Bring an object's chunks into their slots; False for a miss of any kind, which has been counted."""
        try:
            with found.tier.reading(found.key, restoration.deadline) as value:
                if isinstance(value, Miss):
                    return False
                chunks = unpack_bytes(
                    value,
                    found.digest,
                    self._codec,
                    layout=self._pool.layout,
                    namespace=restoration.namespace,
                    secret=self._secret,
                )
                if len(chunks) != found.run.last - found.run.first + 1:
                    raise FrameError("header", "the object holds another number of chunks than its name says")
                return self._write(restoration, found.run, chunks)
        except FrameError as error:
            found.tier.counters.missed(error.reason)
            log.warning("an object of the %s tier was refused: %s", found.tier.name, error)
            if error.reason not in _OTHERS:
                found.tier.delete([found.key])
            return False

    def _write(self, restoration: Restoration, run: Run, chunks: list[memoryview]) -> bool:
        """Copy chunks that were not there before into their slots; False if they are nobody's any more."""
        with restoration.writing:
            if restoration.ended:
                return False
            for depth, chunk in enumerate(chunks, run.first):
                if depth > restoration.depth:
                    self._pool.copy_in(restoration.slots[depth - 1], chunk)
            return True
