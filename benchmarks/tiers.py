"""Tiers: GB/s of stores and loads through the whole path beside the raw medium, and where loading beats computing.

    python benchmarks/tiers.py

The whole path of a store is pool -> sealed frame -> tier, that of a load tier -> checked frame -> pool. Raw is the same
number of bytes through redis-py with hiredis on as many connections; a file read from the page cache, into new bytes
that are thrown away (in the processor's cache, then) and into memory that is kept, 32 MiB in turns, as slots are; a
new file written and flushed. On one thread, and on two, as the engine loads and spills. Ratios are taken within a
round; their median and quartiles are printed.

From the medium: the same loads when the page cache holds none of it, as after a restart of the machine, beside files of
a chunk each and beside one file of all chunks, read from its beginning to its end.

Passes: what a load from disk is made of, each alone on values where they lie.

Break-even: the time to the first token of prompts on a random model of SmolLM2-135M's shape, computed, and loaded from
the tier by the engine as it is.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import redis
import torch
import xxhash
from harness import interleave, interleaved_samples, table, write_results
from redis_process import RedisProcess
from shapes import random_model, random_tokens

from stemcache import Engine, SamplingParams
from stemcache.engine.cold import ColdOptions
from stemcache.engine.freed_memory import keep_freed_memory
from stemcache.engine.restoration import LoadBudget
from stemcache.prefixtree.chunk_frames import ChunkDraft, unpack_bytes
from stemcache.prefixtree.codecs.registry import get_codec
from stemcache.prefixtree.frame import FrameHeader
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.tiers.disk import DiskTier
from stemcache.prefixtree.tiers.host import HostTier
from stemcache.prefixtree.tiers.redis import RedisTier
from stemcache.prefixtree.tiers.tier import Tier, tier_key
from stemcache.prefixtree.tokens import encode_tokens

SIZES = [128 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20]
THREADS = [1, 2]
IN_A_ROW = 4  # chunks in a round, as a prompt has more than one
FLUSHED_BYTES = 64 << 20  # in a round of stores to the disk, for the disk lets bursts through faster than what lasts
FLUSHES = 9
COLD_ROUNDS = 11
ONE = SamplingParams(max_tokens=1, temperature=0)
FAR = 60.0
RATIOS = [  # ours, and what it is compared with
    ("disk load", "file read"),
    ("disk load", "file read, kept"),
    ("redis load", "redis-py GET"),
    ("redis store", "redis-py SET"),
    ("disk store", "file flushed"),
]
COLD_RATIOS = [("disk load", "files read"), ("disk load", "one file read")]
Ways = Mapping[str, Callable[[], object]]


class ChunkPath:
    """Chunks on their way: 32 MiB of keys and of slots, so that no cache is kinder than it will be."""

    def __init__(self, size: int, codec: str) -> None:
        self.size, self.codec = size, get_codec(codec)
        self.layout = KVLayout(layers=size >> 16, kv_heads=4, head_dim=64, dtype="bfloat16", chunk_tokens=64)
        assert self.layout.bytes_per_chunk == size
        self.n = max(4, (32 << 20) // size)
        self.pool = KVPool(self.layout, self.n)
        self.pool.tensor.normal_()
        self.namespace = Namespace(bytes(32))
        self.headers = [self.header(i) for i in range(self.n)]
        self.turns, self.new = count(), count(self.n)

    def store(self, tier: Tier, number: int | None = None) -> None:
        turn = next(self.turns)
        header = self.headers[turn % self.n] if number is None else self.header(number)
        draft = ChunkDraft(header, self.codec)
        self.pool.copy_out(turn % self.n, draft.parts[0])
        assert tier.store(tier_key(bytes(32), header.digest), draft.pack(), time.monotonic() + FAR) is None

    def load(self, tier: Tier) -> None:
        turn = next(self.turns)
        header = self.headers[turn % self.n]
        with tier.reading(tier_key(bytes(32), header.digest), time.monotonic() + FAR) as value:
            assert not isinstance(value, str), value
            (chunk,) = unpack_bytes(value, header.digest, self.codec, layout=self.layout, namespace=self.namespace)
            self.pool.copy_in((turn + 1) % self.n, chunk)

    def look(self, tier: Tier, *, check: bool = False, copy: bool = False) -> None:
        """A part of `load`: the passes over the bytes without the frame."""
        turn = next(self.turns)
        key = tier_key(bytes(32), self.headers[turn % self.n].digest)
        with tier.reading(key, time.monotonic() + FAR) as value:
            assert not isinstance(value, str), value
            chunk = memoryview(value)[-self.size :]
            if check:
                xxhash.xxh3_128_digest(chunk)
            if copy:
                self.pool.copy_in((turn + 1) % self.n, chunk)

    def header(self, i: int) -> FrameHeader:
        return FrameHeader(self.codec.name, self.layout, self.namespace, bytes(32), encode_tokens([i] * 64))


def throughput(size: int, url: str, folder: Path, codec: str, repeats: int, threads: int) -> dict[str, list[float]]:
    """Seconds a chunk of each way, round by round, in interleaved runs."""
    path, blob = ChunkPath(size, codec), random.Random(0).randbytes(size)
    client = redis.Redis.from_url(url, protocol=2, socket_read_size=1 << 20)
    folder = folder / f"{size}-{threads}"
    tiers: dict[str, Tier] = {
        "host": HostTier(1 << 30),
        "disk": DiskTier(folder, 2 << 30),
        "redis": RedisTier(f"{url}?prefix=bench"),
    }
    files = [folder / f"{i}.raw" for i in range(path.n)]
    for i, file in enumerate(files):
        file.write_bytes(blob)
        client.set(f"raw:{i}", blob)
        for tier in tiers.values():
            path.store(tier, i)
    turn, kept = count(), [(memoryview(bytearray(size)), file) for file in files]
    ways: dict[str, Callable[[], object]] = {
        f"{name} load": lambda t=tier: path.load(t) for name, tier in tiers.items()
    }
    ways |= {
        "file read": lambda: read(files[next(turn) % path.n]),
        "file read, kept": lambda: read_into(*kept[next(turn) % path.n]),
        "redis-py GET": lambda: client.get(f"raw:{next(turn) % path.n}"),
        "redis store": lambda: path.store(tiers["redis"]),
        "redis-py SET": lambda: client.set(f"raw:{next(turn) % path.n}", blob),
    }
    if codec == "raw":
        ways |= {
            "pass: none": lambda: path.look(tiers["disk"]),
            "pass: checksum": lambda: path.look(tiers["disk"], check=True),
            "pass: copy": lambda: path.look(tiers["disk"], copy=True),
        }
    flushed = {
        "disk store": lambda: path.store(tiers["disk"], next(path.new)),
        "file flushed": lambda: write(folder / f"{next(turn)}.new", blob),
    }
    with ThreadPoolExecutor(threads) as pool:
        seconds = side_by_side(ways, pool, threads, IN_A_ROW, repeats)
        seconds |= side_by_side(flushed, pool, threads, FLUSHED_BYTES // size, FLUSHES)
    for tier in tiers.values():
        tier.close()
    client.flushall()
    client.close()
    shutil.rmtree(folder)
    return seconds


def side_by_side(
    ways: Ways, pool: ThreadPoolExecutor, threads: int, times: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds for one call of each way, which a round makes so many times, by the threads of `pool` if several."""

    def several(way: Callable[[], object]) -> None:
        if threads == 1:
            for _ in range(times):
                way()
        else:
            for done in [pool.submit(way) for _ in range(times)]:
                done.result()

    rounds = interleaved_samples({name: partial(several, way) for name, way in ways.items()}, repeats=repeats)
    return {way: [each / times for each in samples] for way, samples in rounds.items()}


def read(file: Path) -> bytes:
    with file.open("rb", buffering=0) as stream:
        return stream.read()


def read_into(kept: memoryview, file: Path) -> None:
    with file.open("rb", buffering=0) as stream:
        assert stream.readinto(kept) == len(kept)


def write(file: Path, blob: bytes) -> None:
    with file.open("wb", buffering=0) as stream:
        stream.write(blob)
        os.fdatasync(stream.fileno())  # it stays, as values do: blocks that were freed are written faster than new ones


def cold_throughput(size: int, folder: Path, codec: str, threads: int) -> dict[str, list[float]]:
    """Seconds a chunk, round by round, of loads and reads that nobody has the bytes of but the medium."""
    path, blob = ChunkPath(size, codec), random.Random(0).randbytes(size)
    folder = folder / f"cold-{size}-{threads}"
    tier = DiskTier(folder, 1 << 30)
    for i in range(path.n):
        path.store(tier, i)
    tier.close()
    kept = [(memoryview(bytearray(size)), folder / f"{i}.raw") for i in range(path.n)]
    for _, file in kept:
        write(file, blob)
    whole = folder / "whole.raw"
    write(whole, blob * path.n)
    seconds: dict[str, list[float]] = {"disk load": [], "files read": [], "one file read": []}

    def take(way: str, calls: list[Callable[[], object]]) -> None:
        begin = time.perf_counter()
        for done in [pool.submit(call) for call in calls]:
            done.result()
        seconds[way].append((time.perf_counter() - begin) / path.n)

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COLD_ROUNDS):
            leave_page_cache(folder)
            tier = DiskTier(folder, 1 << 30)
            take("disk load", [partial(path.load, tier)] * path.n)
            tier.close()  # what is mapped stays in the page cache
            take("files read", [partial(read_into, *at) for at in kept])
            take("one file read", [partial(read_part, at[0], whole, i * size) for i, at in enumerate(kept)])
    return seconds


def read_part(kept: memoryview, file: Path, offset: int) -> None:
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        assert stream.readinto(kept) == len(kept)


def leave_page_cache(folder: Path) -> None:
    """Drop what the page cache holds of the files under `folder`, which are flushed and mapped by nobody."""
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb", buffering=0) as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ratios(seconds: Mapping[str, list[float]], compared: list[tuple[str, str]] = RATIOS) -> dict[str, dict[str, float]]:
    """How fast each of ours is, relative to raw, within a round: median and quartiles."""
    found = {}
    for ours, raw in compared:
        each = sorted(other / own for own, other in zip(seconds[ours], seconds[raw], strict=True))
        low, median, high = statistics.quantiles(each, n=4)
        found[f"{ours} / {raw}"] = {"median": median, "low": low, "high": high}
    return found


def report(title: str, seconds: Mapping[int, dict[str, list[float]]], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Print the tables of all sizes, and return them."""
    rates = {
        size: {way: size / statistics.median(each) / 1e9 for way, each in ways.items()}
        for size, ways in seconds.items()
    }
    compared = {size: ratios(ways, pairs) for size, ways in seconds.items()}
    columns = [f"{size >> 10} KiB" for size in SIZES]
    print(f"\n{title}", flush=True)
    print(table(["GB/s", *columns], [
        [way, *(f"{rates[size][way]:.2f}" for size in SIZES)] for way in rates[SIZES[0]]
    ]))  # fmt: skip
    print(table(["ours / raw: median (quartiles)", *columns], [
        [name, *("{median:.2f} ({low:.2f}, {high:.2f})".format(**compared[size][name]) for size in SIZES)]
        for name in compared[SIZES[0]]
    ]), flush=True)  # fmt: skip
    return {"gigabytes_per_second": rates, "ratios": compared}


@contextmanager
def engine_over(address: str, dtype: str) -> Iterator[Engine]:
    cold = ColdOptions(address, cold_bytes=2 << 30, budget=LoadBudget(30, 30))
    with Engine.from_model(random_model(dtype), pool_bytes=1 << 29, cold=cold) as engine:
        yield engine


def load_always(engine: Engine, always: bool) -> None:
    """Load, or compute, whatever either costs."""
    engine._loop.cold.cost.advises = lambda *asked: always  # type: ignore[method-assign]


def break_even(address: str, dtype: str, lengths: list[int], repeats: int) -> list[dict[str, float]]:
    """Seconds to the first token for each length: computed, and loaded."""
    rng, rows = random.Random(0), []
    with engine_over(address, dtype) as engine:
        for length in lengths:
            stored = random_tokens(rng, length + 1)
            list(engine.submit(stored, ONE))
            engine._loop.cold.spiller.writes.drain(60)

            def loaded(stored: list[int] = stored) -> None:
                engine.clear_cache()
                load_always(engine, True)
                stream = engine.submit(stored, ONE)
                list(stream)
                assert stream.usage.cached_tokens >= len(stored) - 64, stream.usage

            def computed(length: int = length) -> None:
                engine.clear_cache()
                load_always(engine, False)
                list(engine.submit(random_tokens(rng, length + 1), ONE))

            timings = interleave({"computed": computed, "loaded": loaded}, repeats=repeats, warmup=1)
            rows.append({"tokens": length} | {name: timing.median for name, timing in timings.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--codec", default="raw")
    parser.add_argument("--skip-break-even", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as an engine does; raw reads into new memory gain by it too
    payload: dict[str, Any] = {"codec": options.codec, "threads": {}, "from_the_medium": {}, "break_even": {}}
    with RedisProcess("maxmemory 1gb", "maxmemory-policy allkeys-lru") as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for threads in THREADS:
            title, codec = f"{threads} thread{'s' * (threads > 1)}", options.codec
            measured = {size: throughput(size, server.url, folder, codec, options.repeats, threads) for size in SIZES}
            payload["threads"][threads] = report(title, measured, RATIOS)
            measured = {size: cold_throughput(size, folder, codec, threads) for size in SIZES}
            payload["from_the_medium"][threads] = report(f"{title}, from the medium", measured, COLD_RATIOS)
        if not options.skip_break_even:
            for address in (f"disk://{folder}/break-even", server.url):
                kind = address.partition(":")[0]
                rows = break_even(address, "bfloat16", [128, 256, 512, 1024], 3)
                payload["break_even"][kind] = rows
                print(f"\nmilliseconds to the first token, SmolLM2-135M's shape in bfloat16, {kind}")
                print(table(["tokens", "computed", "loaded", "computed / loaded"], [
                    [row["tokens"], f"{1000 * row['computed']:.0f}", f"{1000 * row['loaded']:.0f}",
                     f"{row['computed'] / row['loaded']:.1f}"] for row in rows
                ]))  # fmt: skip
    print(f"\nwritten to {write_results('tiers', payload)}")


if __name__ == "__main__":
    main()
