"""The disk as a tier: four LMDB files, so that threads need not wait for one another to write.

Invariant: a key's file is told from the key alone, so whoever opens the folder finds what was stored in it.

Why several: LMDB has one writer a file, who waits for the disk at each transaction. Two threads store 1.1 to 1.4 times
as fast on two files as on one, and 1.3 to 1.5 times on four (1 and 2 MiB a value). Several values in one transaction
gained nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Final

from stemcache.prefixtree.errors import TierError
from stemcache.prefixtree.tiers.disk_file import MIN_FILE_BYTES, DiskFile
from stemcache.prefixtree.tiers.tier import Miss, Refusal, TierCounters, TierStats, Value

FILES: Final = 4
"""Part of the format: with another number, what is there would not be found."""
MIN_BYTES: Final = FILES * MIN_FILE_BYTES


class DiskTier:
    """The store in `folder`, made if there is none. `max_bytes`: what its files together may grow to.

    Raises:
        TierError: the folder cannot be used, or `max_bytes` is under 64 MiB. A damaged file is no error but put aside.
    """

    name = "disk"

    def __init__(self, folder: Path, max_bytes: int) -> None:
        if max_bytes < MIN_BYTES:
            raise TierError(f"a disk tier needs at least {MIN_BYTES} bytes, not {max_bytes}")
        self.counters = TierCounters()
        self._max_bytes = max_bytes
        self._files: list[DiskFile] = []
        try:
            for i in range(FILES):
                self._files.append(DiskFile(folder / str(i), max_bytes // FILES, self.counters))
        except TierError:
            self.close()
            raise

    def lookup(self, keys: Sequence[bytes], deadline: float) -> list[bool]:
        found: dict[bytes, bool] = {}
        for file, some in self._by_file(keys):
            found.update(zip(some, file.lookup(some), strict=True))
        return [found[key] for key in keys]

    def load(self, keys: Sequence[bytes], deadline: float) -> list[Value | Miss]:
        found: list[Value | Miss] = []
        for key in keys:
            with self.reading(key, deadline) as value:
                found.append(value if isinstance(value, Miss) else bytes(value))
        return found

    def reading(self, key: bytes, deadline: float) -> AbstractContextManager[Value | Miss]:
        return self._file(key).reading(key, deadline)

    def store(self, key: bytes, value: Value, deadline: float) -> Refusal | None:
        refusal = self._file(key).store(key, value)
        if refusal is None:
            self.counters.stored(len(value))
        else:
            self.counters.refused(refusal)
        return refusal

    def touch(self, keys: Sequence[bytes]) -> None:
        for file, some in self._by_file(keys):
            file.touch(some)

    def delete(self, keys: Iterable[bytes]) -> bool:
        gone = [file.delete(some) for file, some in self._by_file(keys)]  # of every file, whatever one of them says
        return all(gone)

    def delete_namespace(self, namespace: bytes) -> bool:
        try:
            return self.delete([key for key, _ in self.scan(namespace)])
        except TierError:
            return False

    def scan(self, namespace: bytes | None = None) -> Iterator[tuple[bytes, int]]:
        return chain.from_iterable([file.scan(namespace) for file in self._files])

    def stats(self) -> TierStats:
        counted = [contents for file in self._files if (contents := file.contents()) is not None]
        objects, n_bytes = (sum(each) for each in zip(*counted, strict=True)) if counted else (None, None)
        is_available = len(counted) == FILES
        return TierStats.of(
            self.name,
            self.counters,
            is_available=is_available,
            objects=objects if is_available else None,
            n_bytes=n_bytes if is_available else None,
            max_bytes=self._max_bytes,
            trouble=next((file.trouble for file in self._files if file.trouble is not None), None),
        )

    def close(self) -> None:
        """As in `Tier`. Waits for those who read a value: without the mapping they would end the process."""
        for file in self._files:
            file.close()

    def check(self) -> None:
        """Raise AssertionError unless each file is sound, and holds nothing but its own keys. For tests."""
        for file in self._files:
            file.check()
            assert all(self._file(key) is file for key, _ in file.scan(None))

    def _file(self, key: bytes) -> DiskFile:
        return self._files[key[-1] % FILES]

    def _by_file(self, keys: Iterable[bytes]) -> Iterator[tuple[DiskFile, list[bytes]]]:
        """The keys of each file that has any, in their order."""
        keys = list(keys)
        for file in self._files:
            some = [key for key in keys if self._file(key) is file]
            if some:
                yield file, some
