"""The disk as a tier: an LMDB file that the processes of one machine share and that outlives them.

Invariants: the file never exceeds `max_bytes`, and holds values of at most seven eighths of that, for LMDB writes new
pages beside the old ones; a value is there whole or not at all, whenever the process or the machine dies: each
transaction is flushed before it counts (`metasync=False` leaves out the second flush: at worst the last transaction is
lost). Why LMDB and neither files nor SQLite: docs/tiers.md has the figures.

Three tables: values by key; (time of the last use, size) by key; keys by (time of the last use, key).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.tiers.tier import KEY_BYTES, Miss, Refusal, TierCounters, TierStats, Value, namespace_prefix

log = logging.getLogger(__name__)

MIN_BYTES: Final = 16 << 20
_FILE: Final = "data.mdb"
_USE: Final = struct.Struct(">QI")  # nanoseconds since 1970, bytes
_TOTAL: Final = b"bytes"

# A full file is cleared this much at a time: one walk over the oldest for several stores.
_EVICTION_SHARE: Final = 64
_MAX_TOUCHES: Final = 4096


class DiskTier:
    """The store in `folder`, made if there is none. `max_bytes`: what its file may grow to.

    Raises:
        TierError: the folder cannot be used, or `max_bytes` is under 16 MiB. A damaged file is no error but put aside.
    """

    name = "disk"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < MIN_BYTES:
            raise TierError(f"a disk tier needs at least {MIN_BYTES} bytes, not {max_bytes}")
        self.counters = TierCounters()
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_values = max_bytes - max_bytes // 8
        self._trouble: str | None = None
        self._closed = False
        self._writing = threading.Lock()
        self._touched: dict[bytes, None] = {}  # to be written with the next store
        self._env = _open(folder, max_bytes)
        self._values, self._uses, self._order, self._meta = (
            self._env.open_db(name) for name in (b"values", b"uses", b"order", b"meta")
        )

    def lookup(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        found = self._read(lambda reader: [reader.get(key, db=self._uses) is not None for key in keys])
        return [False] * len(keys) if found is None else found

    def load(self, keys: Sequence[bytes], deadline: float) -> list[Value | Miss]:
        return [self._load(key, deadline) for key in keys]

    def store(self, key: bytes, value: Value, deadline: float) -> Refusal | None:
        refusal = self._store(key, value)
        if refusal is None:
            self.counters.stored(len(value))
        else:
            self.counters.refused(refusal)
        return refusal

    def touch(self, keys: Sequence[bytes]) -> None:
        """Written with the next store: a flush for each use would cost more than the use."""
        with self._writing:
            for key in keys:
                self._touched.pop(key, None)
                self._touched[key] = None
            if len(self._touched) > _MAX_TOUCHES:
                self._write(self._write_touches)

    def delete(self, keys: Iterable[bytes]) -> bool:
        keys = list(keys)
        with self._writing:
            gone = self._write(lambda writer: sum(self._remove(writer, key) for key in keys))
        if gone is None:
            return self._closed
        with self.counters.lock:
            self.counters.deletions += gone
        return True

    def delete_namespace(self, namespace: bytes) -> bool:
        try:
            return self.delete([key for key, _ in self.scan(namespace)])
        except TierError:
            return False

    def scan(self, namespace: bytes | None = None) -> Iterator[tuple[bytes, int]]:
        prefix = b"" if namespace is None else namespace_prefix(namespace)

        def walk(reader: Any) -> list[tuple[bytes, int]]:
            cursor, found = reader.cursor(self._uses), []
            if cursor.set_range(prefix):
                for key, use in cursor:
                    if not bytes(key).startswith(prefix):
                        break
                    found.append((bytes(key), _USE.unpack(use)[1]))
            return found

        found = self._read(walk)
        if found is None:
            raise TierError(f"the disk tier in {self._folder} cannot be read: {self._trouble}")
        return iter(found)

    def stats(self) -> TierStats:
        counted = self._read(lambda reader: (reader.stat(self._uses)["entries"], self._total(reader)))
        objects, n_bytes = counted or (None, None)
        return TierStats.of(
            self.name,
            self.counters,
            is_available=counted is not None,
            objects=objects,
            n_bytes=n_bytes,
            max_bytes=self._max_bytes,
            trouble=self._trouble,
        )

    def close(self) -> None:
        with self._writing:
            if not self._closed:
                if self._touched:
                    self._write(self._write_touches)
                self._closed = True
                self._env.close()

    def check(self) -> None:
        """Raise AssertionError unless the three tables agree. For tests."""

        def check(reader: Any) -> bool:
            uses = {bytes(key): _USE.unpack(use) for key, use in reader.cursor(self._uses)}
            sizes = {bytes(key): len(value) for key, value in reader.cursor(self._values)}
            order = {
                bytes(entry)[8:]: int.from_bytes(bytes(entry)[:8], "big") for entry, _ in reader.cursor(self._order)
            }
            assert sizes == {key: size for key, (_, size) in uses.items()}
            assert order == {key: used for key, (used, _) in uses.items()}
            assert sum(sizes.values()) == self._total(reader) <= self._max_values
            return True

        assert self._read(check)

    def _load(self, key: bytes, deadline: float) -> Value | Miss:
        begin = time.monotonic()
        if begin >= deadline:
            self.counters.missed(Miss.DEADLINE)
            return Miss.DEADLINE
        found = self._read(lambda reader: (_copied(reader.get(key, db=self._values)),))
        if found is None or found[0] is None:
            miss = Miss.UNAVAILABLE if found is None else Miss.ABSENT
            self.counters.missed(miss)
            return miss
        value: bytes = found[0]
        self.counters.loaded(len(value), time.monotonic() - begin)
        return value

    def _store(self, key: bytes, value: Value) -> Refusal | None:
        assert len(key) == KEY_BYTES
        if len(value) > self._max_values // 4:
            return Refusal.TOO_LARGE
        with self._writing:
            for share in (0, 16, 4):  # pages in a row may be lacking where pages are not: make more room, and again
                stored = self._write(lambda writer, share=share: self._put(writer, key, value, share))
                if stored != "full":
                    break
        match stored:
            case None:
                return Refusal.UNAVAILABLE
            case "full":
                return Refusal.FULL
            case _:
                return None

    def _put(self, writer: Any, key: bytes, value: Value, share: int) -> bool:
        self._write_touches(writer)
        room = self._max_values // share if share else len(value)
        self._make_room(writer, max(room, len(value)))
        if writer.get(key, db=self._uses) is not None:
            self._use(writer, key)
            return True
        used = time.time_ns()
        writer.put(key, value, db=self._values)
        writer.put(key, _USE.pack(used, len(value)), db=self._uses)
        writer.put(used.to_bytes(8, "big") + key, b"", db=self._order)
        self._add_total(writer, len(value))
        return True

    def _make_room(self, writer: Any, room: int) -> None:
        total = self._total(writer)
        if total + room <= self._max_values:
            return
        target = max(0, min(self._max_values - room, total - self._max_values // _EVICTION_SHARE))
        n_evicted = 0
        cursor = writer.cursor(self._order)
        while total > target and cursor.first():
            key = bytes(cursor.key())[8:]
            size = self._remove(writer, key, sized=True)
            if not size:  # an entry that names nothing: the tables were damaged
                cursor.delete()
            total -= size
            n_evicted += 1
        with self.counters.lock:
            self.counters.evictions += n_evicted

    def _remove(self, writer: Any, key: bytes, *, sized: bool = False) -> int:
        """Returns 1, or the value's size, if it was there, else 0."""
        use = writer.get(key, db=self._uses)
        if use is None:
            return 0
        used, size = _USE.unpack(use)
        writer.delete(key, db=self._values)
        writer.delete(key, db=self._uses)
        writer.delete(used.to_bytes(8, "big") + key, db=self._order)
        self._add_total(writer, -size)
        return size if sized else 1

    def _use(self, writer: Any, key: bytes) -> None:
        use = writer.get(key, db=self._uses)
        if use is None:
            return
        before, size = _USE.unpack(use)
        used = max(time.time_ns(), before + 1)
        writer.delete(before.to_bytes(8, "big") + key, db=self._order)
        writer.put(key, _USE.pack(used, size), db=self._uses)
        writer.put(used.to_bytes(8, "big") + key, b"", db=self._order)

    def _write_touches(self, writer: Any) -> None:
        touched, self._touched = self._touched, {}
        for key in touched:
            self._use(writer, key)

    def _total(self, reader: Any) -> int:
        return int.from_bytes(reader.get(_TOTAL, db=self._meta, default=b""), "big")

    def _add_total(self, writer: Any, n_bytes: int) -> None:
        writer.put(_TOTAL, max(0, self._total(writer) + n_bytes).to_bytes(8, "big"), db=self._meta)

    def _read(self, function: Any) -> Any:
        """What `function` gives of a read transaction; None, and trouble noted, where the file cannot be read."""
        return self._transact(function, write=False)

    def _write(self, function: Any) -> Any:
        """What `function` gives of a write transaction, or "full", or None; then nothing of it was done."""
        return self._transact(function, write=True)

    def _transact(self, function: Any, *, write: bool) -> Any:
        import lmdb

        if self._closed:
            return None
        try:
            with self._env.begin(write=write, buffers=True) as transaction:
                return function(transaction)
        except lmdb.MapFullError:
            return "full"
        except lmdb.MapResizedError:  # another process has opened it with another size
            self._env.set_mapsize(0)
            return None
        except (lmdb.Error, OSError, struct.error, ValueError) as error:
            if str(error) != self._trouble:
                log.warning("the disk tier in %s failed: %s", self._folder, error)
            self._trouble = str(error)
            return None


def _copied(value: Any) -> bytes | None:
    """Out of the file's mapping, whose pages are another's as soon as the transaction ends."""
    return None if value is None else bytes(value)


def _open(folder: Path, max_bytes: int) -> Any:
    """Raises TierError."""
    try:
        import lmdb
    except ImportError:
        raise TierError("the disk tier needs LMDB: pip install lmdb") from None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return _open_sound(folder, max_bytes)
        except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as error:
            log.warning("the disk tier in %s is damaged and begins anew: %s", folder, error)
            (folder / _FILE).replace(folder / f"{_FILE}.damaged")
            return _open_sound(folder, max_bytes)
    except (lmdb.Error, OSError) as error:
        raise TierError(f"the disk tier cannot use {folder}: {error}") from error


def _open_sound(folder: Path, max_bytes: int) -> Any:
    """Raises lmdb.Error; CorruptedError too where the file is shorter than it says, which would end in a bus error."""
    import lmdb

    env = lmdb.open(
        str(folder), map_size=max_bytes, max_dbs=4, metasync=False, max_readers=512, mode=0o600, meminit=False
    )
    page, last = env.stat()["psize"], env.info()["last_pgno"]
    size = os.stat(folder / _FILE).st_size
    if last > 1 and size < (last + 1) * page:
        env.close()
        raise lmdb.CorruptedError(f"{_FILE} has {size} bytes, fewer than the {(last + 1) * page} that belong there")
    env.reader_check()  # readers whose process was killed
    return env
