"""The tables of the disk tier, in one LMDB file.

Invariant: after each transaction the three tables name the same keys, and the total is the sum of their values' sizes.

    values   value by key
    uses     (time of the last use, size) by key
    order    keys by (time of the last use, key)
    meta     the total
"""

from __future__ import annotations

import struct
import time
from typing import Any, Final

from stemcache.prefixtree.tiers.tier import Value

_USE: Final = struct.Struct(">QI")  # nanoseconds since 1970, bytes
_TOTAL: Final = b"bytes"
TABLES: Final = 4


class DiskTables:
    """Methods take a transaction of `env` (with buffers=True), and raise what LMDB raises."""

    def __init__(self, env: Any) -> None:
        self._values, self._uses, self._order, self._meta = (
            env.open_db(name) for name in (b"values", b"uses", b"order", b"meta")
        )

    def has(self, reader: Any, key: bytes) -> bool:
        return reader.get(key, db=self._uses) is not None

    def view(self, reader: Any, key: bytes) -> memoryview | None:
        """The value, where it lies in the file's mapping: another's as soon as the transaction ends."""
        found: memoryview | None = reader.get(key, db=self._values)
        return found

    def count(self, reader: Any) -> int:
        n_keys: int = reader.stat(self._uses)["entries"]
        return n_keys

    def total(self, reader: Any) -> int:
        """The bytes of all values."""
        return int.from_bytes(reader.get(_TOTAL, db=self._meta, default=b""), "big")

    def scan(self, reader: Any, prefix: bytes) -> list[tuple[bytes, int]]:
        """Keys that begin with `prefix`, and the sizes of their values."""
        cursor, found = reader.cursor(self._uses), []
        if cursor.set_range(prefix):
            for key, use in cursor:
                if not bytes(key).startswith(prefix):
                    break
                found.append((bytes(key), _USE.unpack(use)[1]))
        return found

    def put(self, writer: Any, key: bytes, value: Value) -> None:
        """Add a key that is not there."""
        used = time.time_ns()
        writer.put(key, value, db=self._values)
        writer.put(key, _USE.pack(used, len(value)), db=self._uses)
        writer.put(used.to_bytes(8, "big") + key, b"", db=self._order)
        self._add(writer, len(value))

    def use(self, writer: Any, key: bytes) -> None:
        """Make a key the last used one, if it is there."""
        use = writer.get(key, db=self._uses)
        if use is None:
            return
        before, size = _USE.unpack(use)
        used = max(time.time_ns(), before + 1)
        writer.delete(before.to_bytes(8, "big") + key, db=self._order)
        writer.put(key, _USE.pack(used, size), db=self._uses)
        writer.put(used.to_bytes(8, "big") + key, b"", db=self._order)

    def remove(self, writer: Any, key: bytes) -> int | None:
        """Forget a key. Returns the size of its value; None if it was not there."""
        use = writer.get(key, db=self._uses)
        if use is None:
            return None
        used, size = _USE.unpack(use)
        writer.delete(key, db=self._values)
        writer.delete(key, db=self._uses)
        writer.delete(used.to_bytes(8, "big") + key, db=self._order)
        self._add(writer, -size)
        return int(size)

    def evict(self, writer: Any, target: int) -> int:
        """Forget the least recently used until the total is at most `target`. Returns how many."""
        n_evicted = 0
        cursor = writer.cursor(self._order)
        while self.total(writer) > target and cursor.first():
            if self.remove(writer, bytes(cursor.key())[8:]) is None:
                cursor.delete()  # an entry that names nothing: the file was damaged
            n_evicted += 1
        return n_evicted

    def renew(self, writer: Any) -> None:
        """Change nothing, but so that the transaction counts as one."""
        self._add(writer, 0)

    def check(self, reader: Any) -> None:
        """Raise AssertionError unless the tables agree. For tests."""
        uses = {bytes(key): _USE.unpack(use) for key, use in reader.cursor(self._uses)}
        sizes = {bytes(key): len(value) for key, value in reader.cursor(self._values)}
        order = {bytes(entry)[8:]: int.from_bytes(bytes(entry)[:8], "big") for entry, _ in reader.cursor(self._order)}
        assert sizes == {key: size for key, (_, size) in uses.items()}
        assert order == {key: used for key, (used, _) in uses.items()}
        assert sum(sizes.values()) == self.total(reader)

    def _add(self, writer: Any, n_bytes: int) -> None:
        writer.put(_TOTAL, max(0, self.total(writer) + n_bytes).to_bytes(8, "big"), db=self._meta)
