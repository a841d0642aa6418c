"""The two kernels of the CPU backend side by side in bfloat16: the fused one, and calls of PyTorch's flash kernel.

    python benchmarks/cpu_kernels.py [--threads 2] [--repeats 15]

Steps of SmolLM2-135M's heads (9 query heads over 3 of 64) and of Qwen3-0.6B's (16 over 8 of 128), microseconds a layer,
in turns: median (minimum-maximum). Each call has the keys of another layer, so that they come from memory as in a
model. GFLOP/s are those of the products over visible keys; errors are relative to the largest output in float64. It
runs wherever the fused kernel can, which is where there is AVX512_BF16: also where the backend does not choose it,
which is beside AMX, so that this is the command that would tell whether it should.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

from stemcache.kernels import bfloat16_pairs, cpu, fused, reference
from stemcache.kernels.attention import append_kv
from stemcache.kernels.cpu_schedule import has_amx
from stemcache.kernels.plan import AttentionPlan, SequenceRows

CHUNK = 64
BYTES = 128 << 20
"""Of keys and values that calls take in turn, more than a processor's caches."""
FEW_ROWS = 256
"""Up to which that matters, and takes no minutes."""
SMOLLM2, QWEN3 = (9, 3, 64), (16, 8, 128)
STEPS: list[tuple[str, tuple[int, int, int], int, int, int, int]] = [
    # heads, sequences, tokens that all share, tokens of its own that each has cached, new tokens
    ("one sequence, 2,048", SMOLLM2, 1, 2048, 16, 1),
    ("one sequence, 256", SMOLLM2, 1, 256, 16, 1),
    ("8 sharers of 2,048", SMOLLM2, 8, 2048, 16, 1),
    ("32 sharers of 2,048", SMOLLM2, 32, 2048, 16, 1),
    ("8 without sharing, 2,048", SMOLLM2, 8, 0, 2048, 1),
    ("256 without sharing, 128", SMOLLM2, 256, 0, 128, 1),
    ("warm prompt, 32 after 2,048", SMOLLM2, 1, 2048, 0, 32),
    ("8 warm prompts, 32 after 2,048", SMOLLM2, 8, 2048, 0, 32),
    ("512 after 1,536", SMOLLM2, 1, 1536, 0, 512),
    ("cold prompt, 2,048", SMOLLM2, 1, 0, 0, 2048),
    ("Qwen3: one sequence, 2,048", QWEN3, 1, 2048, 16, 1),
    ("Qwen3: 8 sharers of 2,048", QWEN3, 8, 2048, 16, 1),
    ("Qwen3: warm prompt, 32 after 2,048", QWEN3, 1, 2048, 0, 32),
    ("Qwen3: cold prompt, 2,048", QWEN3, 1, 0, 0, 2048),
]


def plan_of(sequences: int, shared: int, own: int, new: int) -> AttentionPlan:
    common = np.arange(shared // CHUNK, dtype=np.int32)
    private = -(-(own + new) // CHUNK)
    start = shared + own
    rows = [
        SequenceRows(
            np.append(common, len(common) + i * private + np.arange(private, dtype=np.int32)), start, start + new
        )
        for i in range(sequences)
    ]
    return AttentionPlan.build(rows, chunk_tokens=CHUNK)


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).abs().max() / expected.abs().max())


def over_layers(attend: Callable[[Tensor], Tensor], layers: Sequence[Tensor]) -> None:
    for pool in layers:
        attend(pool)


def measure(step: tuple[str, tuple[int, int, int], int, int, int, int], repeats: int) -> dict[str, Any]:
    name, (q_heads, kv_heads, head_dim), *shape = step
    plan, scale = plan_of(*shape), head_dim**-0.5
    generator = torch.Generator().manual_seed(0)
    shape_of_pool = 2, kv_heads, plan.max_chunk + 1, CHUNK, head_dim
    pool = torch.randn(shape_of_pool, generator=generator).bfloat16()
    query = torch.randn((plan.n_rows, q_heads, head_dim), generator=generator).bfloat16()
    append_kv(pool, *torch.randn((2, plan.n_rows, kv_heads, head_dim), generator=generator).bfloat16(), plan)
    expected = reference.attend(query.double(), pool.double(), plan, scale=scale).double()
    kernels = {
        "fused": lambda pool: fused.attend(query, pool, plan, scale=scale),
        "flash": lambda pool: cpu.attend_by_flash(query, pool, plan, scale=scale),
    }
    errors = {kernel: error(attend(pool), expected) for kernel, attend in kernels.items()}
    layers = [pool.clone() for _ in range(-(-BYTES // pool.nbytes) if plan.n_rows <= FEW_ROWS else 1)]
    runs = {kernel: partial(over_layers, attend, layers) for kernel, attend in kernels.items()}
    timings = {
        kernel: harness.Timing(*(seconds / len(layers) for seconds in astuple(timing)))
        for kernel, timing in harness.interleave(runs, repeats=repeats).items()
    }
    operations = 4 * q_heads * head_dim * int((plan.positions + 1).sum())
    return {
        "step": name,
        "seconds": {kernel: asdict(timing) for kernel, timing in timings.items()},
        "flash / fused": timings["flash"].median / timings["fused"].median,
        "operations_per_second": operations / timings["fused"].median,
        "errors": errors,
    }


def cells(result: dict[str, Any]) -> list[str]:
    spans = [
        f"{t['median'] * 1e6:.0f} ({t['low'] * 1e6:.0f}-{t['high'] * 1e6:.0f})" for t in result["seconds"].values()
    ]
    rate = f"{result['operations_per_second'] / 1e9:.0f}"
    return [
        result["step"],
        *spans,
        f"{result['flash / fused']:.2f}",
        rate,
        *(f"{e:.4f}" for e in result["errors"].values()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if not bfloat16_pairs.can_run():
        raise SystemExit("the fused kernel needs AVX512_BF16, numba and an OpenMP runtime that can be reached")
    torch.set_num_threads(arguments.threads)
    results = [measure(step, arguments.repeats) for step in STEPS]
    header = ["us a layer", "fused", "flash", "flash / fused", "GFLOP/s", "error", "of flash"]
    print(harness.table(header, [cells(result) for result in results]))
    payload = {"threads": arguments.threads, "amx": has_amx(), "results": results}
    print(harness.write_results("cpu-kernels", payload))


if __name__ == "__main__":
    main()
