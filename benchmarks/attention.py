"""Attention of one decode step on the CPU, per layer, against sdpa over gathered keys and values.

Shape of SmolLM2-135M: 9 query heads, 3 KV heads, head_dim 64. Each of B sequences has one query over S tokens common to
all and 32 of its own. A sample runs four layers, each over keys and values of its own, as a model does: the code is
warm and the data no warmer than they would be. Columns, microseconds a layer, median (minimum-maximum):

  stemcache     attend() over the chunk pool
  sdpa          KV already gathered per sequence and repeated per query head, as transformers does it
  sdpa+repeat   repeat_kv and sdpa over gathered KV: what a transformers layer does in a step
  sdpa+gather   chunks gathered from the pool, repeated, sdpa: what a pool without this kernel would do
  sdpa gqa      sdpa(enable_gqa=True) over gathered KV
  floor         bytes of the distinct keys and values, at the measured read rate
  plan          AttentionPlan.build and its first schedule or cut, once a step for all layers

    python benchmarks/attention.py [--threads 2] [--repeats 9]

On a busy machine set OMP_WAIT_POLICY=PASSIVE: spinning threads make every parallel region wait for a time slice of the
other processes (8 ms were seen), which hurts the short regions most. With one thread the clock is the process's CPU
time, which leaves the waiting out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import harness
import numpy as np
import torch
from harness import Timing
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stemcache.engine.freed_memory import keep_freed_memory
from stemcache.kernels import fused
from stemcache.kernels.attention import attend
from stemcache.kernels.cpu_schedule import schedule
from stemcache.kernels.fused_units import cut
from stemcache.kernels.plan import AttentionPlan, SequenceRows

LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, CHUNK, PRIVATE = 4, 9, 3, 64, 64, 32
SHAPES = ((1, 2048), (8, 2048), (8, 4096), (32, 2048), (32, 4096))


def read_rate() -> float:
    """Bytes a second that a sum over 64 MB reads: best of ten, since the floor wants the machine's best."""
    source = torch.ones(16 << 20)
    timing = harness.interleave({"read": source.sum}, repeats=10)["read"]
    return source.nbytes / timing.low


def sequences(sharers: int, shared: int) -> list[SequenceRows]:
    common = np.arange(shared // CHUNK, dtype=np.int32)
    stop = shared + PRIVATE
    return [SequenceRows(np.append(common, np.int32(len(common) + i)), stop - 1, stop) for i in range(sharers)]


@dataclass(frozen=True)
class Step:
    """One decode step of `sharers` sequences, in both layouts, for LAYERS layers."""

    rows: list[SequenceRows]
    plan: AttentionPlan
    query: Tensor  # [B, q_heads, head_dim]
    pools: list[Tensor]  # [2, kv_heads, chunks, C, head_dim]

    @classmethod
    def random(cls, sharers: int, shared: int, dtype: torch.dtype) -> Step:
        rows = sequences(sharers, shared)
        plan = AttentionPlan.build(rows, chunk_tokens=CHUNK)
        generator = torch.Generator().manual_seed(0)
        shape = (2, KV_HEADS, plan.max_chunk + 1, CHUNK, HEAD_DIM)
        pools = [torch.randn(shape, generator=generator).to(dtype) for _ in range(LAYERS)]
        return cls(rows, plan, torch.randn(sharers, Q_HEADS, HEAD_DIM, generator=generator).to(dtype), pools)

    def gather(self, pool: Tensor) -> Tensor:
        """[2, B, kv_heads, tokens, head_dim]: a copy of each sequence's keys and values."""
        index = torch.from_numpy(np.stack([s.chunks for s in self.rows]).astype(np.int64)).flatten()
        gathered = pool.index_select(2, index).view(2, KV_HEADS, len(self.rows), -1, HEAD_DIM)
        return gathered[:, :, :, : self.rows[0].stop].transpose(1, 2)

    def attend(self, pool: Tensor) -> Tensor:
        return attend(self.query, pool, self.plan, scale=HEAD_DIM**-0.5)

    def sdpa(self, key_value: Tensor, **options: bool) -> Tensor:
        query = self.query.unsqueeze(2)
        return scaled_dot_product_attention(query, key_value[0], key_value[1], scale=HEAD_DIM**-0.5, **options)

    def replan(self) -> None:
        fresh = AttentionPlan.build(self.rows, chunk_tokens=CHUNK)
        heads = {"group": Q_HEADS // KV_HEADS, "kv_heads": KV_HEADS}
        if fused.serves(self.query, scale=HEAD_DIM**-0.5, softcap=None):
            cut(fresh, window=None, threads=torch.get_num_threads(), **heads)
        else:
            schedule(fresh, window=None, dtype=self.query.dtype, **heads)


def repeat(key_value: Tensor) -> Tensor:
    return key_value.repeat_interleave(Q_HEADS // KV_HEADS, dim=2)


def measure(sharers: int, shared: int, dtype: torch.dtype, rate: float, **timing: Any) -> dict[str, Any]:
    step = Step.random(sharers, shared, dtype)
    grouped = [step.gather(pool).contiguous() for pool in step.pools]
    repeated = [repeat(key_value) for key_value in grouped]
    functions: dict[str, Callable[[], object]] = {
        "stemcache": lambda: [step.attend(pool) for pool in step.pools],
        "sdpa": lambda: [step.sdpa(key_value) for key_value in repeated],
        "sdpa+repeat": lambda: [step.sdpa(repeat(key_value)) for key_value in grouped],
        "sdpa+gather": lambda: [step.sdpa(repeat(step.gather(pool))) for pool in step.pools],
        "sdpa gqa": lambda: [step.sdpa(key_value, enable_gqa=True) for key_value in grouped],
    }
    error = (step.attend(step.pools[0]).float() - step.sdpa(repeated[0]).squeeze(2).float()).abs().max()
    timings = harness.interleave({**functions, "plan": step.replan}, **timing)
    layer = {n: Timing(t.median / LAYERS, t.low / LAYERS, t.high / LAYERS) for n, t in timings.items() if n != "plan"}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "sharers": sharers,
        "shared_tokens": shared,
        "private_tokens": PRIVATE,
        "max_difference": float(error),
        "floor_seconds": 2 * (shared + sharers * PRIVATE) * KV_HEADS * HEAD_DIM * dtype.itemsize / rate,
        "seconds": {name: asdict(timing) for name, timing in {**layer, "plan": timings["plan"]}.items()},
        "speedup": {name: layer[name].median / layer["stemcache"].median for name in layer if "sdpa" in name},
    }


def cells(result: dict[str, Any]) -> list[str]:
    """One line of the table: median (minimum to maximum) in microseconds, and the ratio of medians to sdpa."""
    shape = f"{result['dtype']} {result['sharers']} x {result['shared_tokens']}"
    spans = [
        f"{t['median'] * 1e6:.0f} ({t['low'] * 1e6:.0f}-{t['high'] * 1e6:.0f})" for t in result["seconds"].values()
    ]
    return [shape, *spans, f"{result['floor_seconds'] * 1e6:.0f}", f"{result['speedup']['sdpa']:.1f}x"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as an engine does: else most of what gathering takes are page faults
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rate = read_rate()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for sharers, shared in SHAPES:
            results.append(measure(sharers, shared, dtype, rate, repeats=arguments.repeats, clock=clock))
    header = ["us a layer", *results[0]["seconds"], "floor", "sdpa / stemcache"]
    print(harness.table(header, [cells(result) for result in results]))
    payload = {
        "threads": arguments.threads,
        "clock": clock.__name__,
        "repeats": arguments.repeats,
        "read_bytes_per_second": rate,
    }
    print(harness.write_results("attention-cpu", {**payload, "results": results}))


if __name__ == "__main__":
    main()
