"""Which store for the disk tier: LMDB, a file for each value, or SQLite, on the same values.

    python benchmarks/disk_stores.py

Stores are flushed as a tier would flush them: LMDB each transaction (without its second flush), SQLite as its WAL does,
files not at all (a value that was cut short is found by its checksum). Loads come from the page cache and end in bytes.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import lmdb
from harness import interleave, table, write_results

SIZES = [128 << 10, 1 << 20, 4 << 20]
ALL = 32 << 20
Action = Callable[[], None]


def with_lmdb(folder: Path, keys: Sequence[bytes], value: bytes) -> tuple[Action, Action]:
    env = lmdb.open(str(folder), map_size=1 << 30, metasync=False)

    def store() -> None:
        for key in keys:
            with env.begin(write=True) as transaction:
                transaction.put(key, value)

    def load() -> None:
        for key in keys:
            with env.begin(buffers=True) as transaction:
                assert len(bytes(transaction.get(key))) == len(value)

    return store, load


def with_files(folder: Path, keys: Sequence[bytes], value: bytes) -> tuple[Action, Action]:
    def store() -> None:
        for key in keys:
            new = folder / f"{key.hex()}.new"
            new.write_bytes(value)
            new.replace(folder / key.hex())

    def load() -> None:
        for key in keys:
            with (folder / key.hex()).open("rb", buffering=0) as stream:
                assert len(stream.read()) == len(value)

    return store, load


def with_sqlite(folder: Path, keys: Sequence[bytes], value: bytes) -> tuple[Action, Action]:
    """The fastest of the settings that were tried: pages of 64 KiB, mapped, read through a blob's handle."""
    database = sqlite3.connect(folder / "values.db", isolation_level=None)
    for pragma in ("page_size=65536", "journal_mode=wal", "synchronous=normal", f"mmap_size={1 << 30}"):
        database.execute(f"pragma {pragma}")
    database.execute("create table stored (key blob primary key, value blob)")

    def store() -> None:
        for key in keys:
            database.execute("insert or replace into stored values (?, ?)", (key, value))

    def load() -> None:
        for key in keys:
            (row,) = database.execute("select rowid from stored where key = ?", (key,)).fetchone()
            with database.blobopen("stored", "value", row, readonly=True) as blob:
                assert len(blob.read()) == len(value)

    return store, load


def main() -> None:
    rng, rows, figures = random.Random(0), [], {}
    for size in SIZES:
        keys, value = [rng.randbytes(48) for _ in range(ALL // size)], rng.randbytes(size)
        with tempfile.TemporaryDirectory() as name:
            ways: dict[str, Action] = {}
            for kind, make in (("LMDB", with_lmdb), ("files", with_files), ("SQLite", with_sqlite)):
                folder = Path(name) / kind
                folder.mkdir()
                ways[f"{kind} store"], ways[f"{kind} load"] = make(folder, keys, value)
            timings = interleave(ways, repeats=5, warmup=1)
        figures[size] = {way: ALL / timing.median / 1e9 for way, timing in timings.items()}
    rows = [[way, *(f"{figures[size][way]:.2f}" for size in SIZES)] for way in sorted(figures[SIZES[0]])]
    print(table(["GB/s", *(f"{size >> 10} KiB" for size in SIZES)], rows))
    print(f"written to {write_results('disk_stores', {'gigabytes_per_second': figures})}")


if __name__ == "__main__":
    main()
