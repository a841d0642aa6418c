"""One LMDB file of the disk tier, which the processes of one machine share and which outlives them.

Invariants: no method but `scan` and the constructor raises; the file never exceeds `max_bytes`, and holds values of at
most seven eighths of that, for LMDB writes new pages beside the old ones; a value is there whole or not at all,
whenever the process or the machine dies: each transaction is flushed before it counts (`metasync=False` leaves out the
second flush: at worst the last transaction is lost); and the file stays mapped while a value is being read where it
lies. Why LMDB and neither files nor SQLite: docs/tiers.md has the figures.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.shared_lock import SharedLock
from stemcache.prefixtree.tiers.disk_tables import TABLES, DiskTables
from stemcache.prefixtree.tiers.tier import KEY_BYTES, Miss, Refusal, TierCounters, Value, namespace_prefix

log = logging.getLogger(__name__)
T = TypeVar("T")

MIN_FILE_BYTES: Final = 16 << 20
_FILE: Final = "data.mdb"

# A full file is cleared this much at a time: one walk over the oldest for several stores.
_EVICTION_SHARE: Final = 64
_MAX_TOUCHES: Final = 4096


class DiskFile:
    """The store in `folder`, made if there is none. `max_bytes`: what its file may grow to, at least `MIN_FILE_BYTES`.

    trouble: what it last failed with, in a sentence; None if all is well.

    Raises:
        TierError: the folder cannot be used. A damaged file is no error but put aside.
    """

    def __init__(self, folder: Path, max_bytes: int, counters: TierCounters) -> None:
        self.trouble: str | None = None
        self._counters = counters
        self._folder = folder
        self._max_values = max_bytes - max_bytes // 8
        self._closed = False
        self._is_resized = False
        self._writing = threading.Lock()
        self._touched: dict[bytes, None] = {}  # to be written with the next store
        self._mapping = SharedLock()  # shared by transactions; held alone by who moves the mapping or takes it away
        self._env = _open(folder, max_bytes)
        self._tables = DiskTables(self._env)

    def lookup(self, keys: Sequence[bytes]) -> list[bool]:
        found = self._transact(lambda reader: [self._tables.has(reader, key) for key in keys])
        return found if isinstance(found, list) else [False] * len(keys)

    @contextmanager
    def reading(self, key: bytes, deadline: float) -> Iterator[Value | Miss]:
        """As in `Tier`: a view of the file's mapping. The transaction keeps its pages from being written again."""
        begin = time.monotonic()
        self._follow_size()
        with self._mapping:
            reader, value = (None, Miss.DEADLINE) if begin >= deadline else self._view(key)
            try:
                yield value
            finally:
                if isinstance(value, Miss):
                    self._counters.missed(value)
                else:  # its bytes came off the disk as they were read
                    self._counters.loaded(len(value), time.monotonic() - begin)
                    value.release()
                if reader is not None:
                    reader.abort()

    def store(self, key: bytes, value: Value) -> Refusal | None:
        """As in `Tier`, but uncounted."""
        assert len(key) == KEY_BYTES
        if len(value) > self._max_values // 4:
            return Refusal.TOO_LARGE
        with self._writing:
            for share in (None, 16, 4):  # pages in a row may be lacking where pages are not: make more room, and again
                if share is not None:
                    # A page that is freed can be written by the second transaction after that, and not before.
                    self._transact(partial(self._make_room, self._max_values // share), write=True)
                    self._transact(self._tables.renew, write=True)
                refusal = self._transact(partial(self._put, key, value), write=True)
                if refusal is not Refusal.FULL:
                    break
        return refusal

    def touch(self, keys: Sequence[bytes]) -> None:
        """Written with the next store: a flush for each use would cost more than the use."""
        with self._writing:
            for key in keys:
                self._touched.pop(key, None)
                self._touched[key] = None
            if len(self._touched) > _MAX_TOUCHES:
                self._transact(self._write_touches, write=True)

    def delete(self, keys: Sequence[bytes]) -> bool:
        with self._writing:
            gone = self._transact(lambda writer: [self._tables.remove(writer, key) for key in keys], write=True)
        if not isinstance(gone, list):
            return self._closed
        with self._counters.lock:
            self._counters.deletions += len(gone) - gone.count(None)
        return True

    def scan(self, namespace: bytes | None) -> list[tuple[bytes, int]]:
        """As in `Tier`. Raises TierError."""
        prefix = b"" if namespace is None else namespace_prefix(namespace)
        found = self._transact(lambda reader: self._tables.scan(reader, prefix))
        if not isinstance(found, list):
            raise TierError(f"the disk tier in {self._folder} cannot be read: {self.trouble}")
        return found

    def contents(self) -> tuple[int, int] | None:
        """How many values there are, and their bytes; None if it cannot be read."""
        counted = self._transact(lambda reader: (self._tables.count(reader), self._tables.total(reader)))
        return counted if isinstance(counted, tuple) else None

    def close(self) -> None:
        """As in `Tier`. Waits for those who read a value: without the mapping they would end the process."""
        with self._writing:
            if self._touched:
                self._transact(self._write_touches, write=True)
            self._closed = True
        with self._mapping.alone():
            self._env.close()

    def check(self) -> None:
        """Raise AssertionError unless the tables agree and the limit holds. For tests."""

        def check(reader: Any) -> bool:
            self._tables.check(reader)
            assert self._tables.total(reader) <= self._max_values
            return True

        assert self._transact(check) is True

    def _view(self, key: bytes) -> tuple[Any, memoryview | Miss]:
        """The value in the mapping, which stays as it is until the transaction, if there is one, is aborted."""
        if self._closed:
            return None, Miss.UNAVAILABLE
        try:
            reader = self._env.begin(buffers=True)
            value = self._tables.view(reader, key)
        except self._errors as error:
            self._note(error)
            return None, Miss.UNAVAILABLE
        return reader, Miss.ABSENT if value is None else value

    def _put(self, key: bytes, value: Value, writer: Any) -> None:
        self._write_touches(writer)
        self._make_room(len(value), writer)
        if self._tables.has(writer, key):
            self._tables.use(writer, key)
        else:
            self._tables.put(writer, key, value)

    def _make_room(self, room: int, writer: Any) -> None:
        total = self._tables.total(writer)
        if total + room > self._max_values:
            target = min(self._max_values - room, total - self._max_values // _EVICTION_SHARE)
            n_evicted = self._tables.evict(writer, max(0, target))
            with self._counters.lock:
                self._counters.evictions += n_evicted

    def _write_touches(self, writer: Any) -> None:
        touched, self._touched = self._touched, {}
        for key in touched:
            self._tables.use(writer, key)

    def _transact(self, function: Callable[[Any], T], *, write: bool = False) -> T | Refusal:
        """What `function` gives of a transaction. Where that fails nothing of it was done: FULL or UNAVAILABLE."""
        import lmdb

        self._follow_size()
        try:
            with self._mapping:
                if self._closed:
                    return Refusal.UNAVAILABLE
                with self._env.begin(write=write, buffers=True) as transaction:
                    return function(transaction)
        except lmdb.MapFullError:
            return Refusal.FULL
        except self._errors as error:
            self._note(error)
            return Refusal.UNAVAILABLE

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        import lmdb

        return lmdb.Error, OSError, struct.error, ValueError

    def _follow_size(self) -> None:
        """Map the file anew where that is due, unless somebody reads: then the next one may."""
        if self._is_resized:
            with self._mapping.alone_now() as nobody_reads:
                if nobody_reads and not self._closed:
                    self._env.set_mapsize(0)
                    self._is_resized = False

    def _note(self, error: Exception) -> None:
        """Log what went wrong, once."""
        import lmdb

        if isinstance(error, lmdb.MapResizedError):  # another process has opened it with another size
            self._is_resized = True
            return
        if str(error) != self.trouble:
            log.warning("the disk tier in %s failed: %s", self._folder, error)
        self.trouble = str(error)


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
        str(folder), map_size=max_bytes, max_dbs=TABLES, metasync=False, max_readers=512, mode=0o600, meminit=False
    )
    page, last = env.stat()["psize"], env.info()["last_pgno"]
    size = os.stat(folder / _FILE).st_size
    if last > 1 and size < (last + 1) * page:
        env.close()
        raise lmdb.CorruptedError(f"{_FILE} has {size} bytes, fewer than the {(last + 1) * page} that belong there")
    env.reader_check()  # readers whose process was killed
    return env
