"""Tiers: GB/s of stores and loads through the whole path beside the raw medium, and where loading beats computing.

    python benchmarks/tiers.py

The whole path of a store is pool -> chunk -> frame -> tier, that of a load tier -> checked frame -> chunk -> pool. Raw
is the same number of bytes through redis-py with hiredis, or a file in the page cache. One connection, one thread.

Break-even: the time to the first token of prompts on a random model of SmolLM2-135M's shape, computed, and loaded from
the tier by the engine as it is.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import torch
from harness import Timing, interleave, table, write_results
from redis_process import RedisProcess
from shapes import random_model, random_tokens

from stemcache import Engine, SamplingParams
from stemcache.engine.cold import ColdOptions
from stemcache.engine.restoration import LoadBudget
from stemcache.prefixtree.chunk_frames import pack_chunks, unpack_chunks
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
ONE = SamplingParams(max_tokens=1, temperature=0)
FAR = 60.0


class ChunkPath:
    """One chunk on its way: `n` different keys, so that no cache is kinder than it will be."""

    def __init__(self, size: int, codec: str, n: int) -> None:
        self.codec = get_codec(codec)
        self.layout = KVLayout(layers=size >> 16, kv_heads=4, head_dim=64, dtype="bfloat16", chunk_tokens=64)
        assert self.layout.bytes_per_chunk == size
        self.pool = KVPool(self.layout, 4)
        self.pool.tensor.normal_()
        self.namespace = Namespace(bytes(32))
        self.headers = [self._header(i) for i in range(n)]
        self.turn = 0

    def store(self, tier: Tier) -> None:
        header = self._next()
        frame = pack_chunks(header, [self.pool.read_chunk(self.turn % 4)], self.codec)
        assert tier.store(tier_key(bytes(32), header.digest), frame, time.monotonic() + FAR) is None

    def load(self, tier: Tier) -> None:
        header = self._next()
        (value,) = tier.load([tier_key(bytes(32), header.digest)], time.monotonic() + FAR)
        assert not isinstance(value, str), value
        (chunk,) = unpack_chunks(value, header.digest, self.codec, layout=self.layout, namespace=self.namespace)
        self.pool.write_chunk(self.turn % 4, chunk)

    def _next(self) -> FrameHeader:
        self.turn += 1
        return self.headers[self.turn % len(self.headers)]

    def _header(self, i: int) -> FrameHeader:
        return FrameHeader(self.codec.name, self.layout, self.namespace, bytes(32), encode_tokens([i] * 64))


def throughput(size: int, url: str, folder: Path, codec: str, repeats: int) -> dict[str, float]:
    """Median GB/s of each way, all in one interleaved run."""
    n = max(4, min(16, (32 << 20) // size))
    path, blob = ChunkPath(size, codec, n), torch.randn(size // 4).numpy().tobytes()
    client = redis.Redis.from_url(url, protocol=2, socket_read_size=1 << 20)
    tiers: dict[str, Tier] = {
        "host": HostTier(1 << 30),
        "disk": DiskTier(folder / str(size), 1 << 30),
        "redis": RedisTier(f"{url}?prefix=bench"),
    }
    files = [folder / f"{size}-{i}" for i in range(n)]
    for i, file in enumerate(files):
        file.write_bytes(blob)
        client.set(f"raw:{i}", blob)
    for tier in tiers.values():
        for _ in range(n):
            path.store(tier)
    turn = iter(range(1 << 30))
    ways: dict[str, Any] = {f"{name} load": lambda tier=tier: path.load(tier) for name, tier in tiers.items()}
    ways |= {
        "redis raw GET": lambda: client.get(f"raw:{next(turn) % n}"),
        "file raw": lambda: read(files[next(turn) % n]),
        "redis store": lambda: path.store(tiers["redis"]),
        "redis raw SET": lambda: client.set(f"raw:{next(turn) % n}", blob),
    }
    timings = interleave(ways, repeats=repeats, warmup=3)
    timings["disk store"] = disk_store(tiers["disk"], path, n)
    for tier in tiers.values():
        tier.close()
    client.flushall()
    return {name: size / timing.median / 1e9 for name, timing in timings.items()}


def disk_store(tier: Tier, path: ChunkPath, n: int) -> Timing:
    """New keys, since an old one is left as it is. Each store is flushed to the disk."""
    tier.delete_namespace(bytes(32))
    return interleave({"store": lambda: path.store(tier)}, repeats=n - 1, warmup=1)["store"]


def read(file: Path) -> bytes:
    with file.open("rb", buffering=0) as stream:
        return stream.read()


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
            engine._loop.cold.spiller.drain(60)

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
    payload: dict[str, Any] = {"codec": options.codec, "gigabytes_per_second": {}, "break_even": {}}
    with RedisProcess("maxmemory 1gb", "maxmemory-policy allkeys-lru") as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in SIZES:
            payload["gigabytes_per_second"][size] = throughput(size, server.url, folder, options.codec, options.repeats)
        rates = payload["gigabytes_per_second"]
        print(table(["GB/s", *(f"{size >> 10} KiB" for size in SIZES)], [
            [way, *(f"{rates[size][way]:.2f}" for size in SIZES)] for way in rates[SIZES[0]]
        ]))  # fmt: skip
        for ours, raw in (("redis load", "redis raw GET"), ("redis store", "redis raw SET"), ("disk load", "file raw")):
            print(f"{ours} / {raw}: ", ", ".join(f"{rates[size][ours] / rates[size][raw]:.2f}" for size in SIZES))
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
