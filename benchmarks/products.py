"""The products of a layer in bfloat16: the compiled kernel beside oneDNN's packed ones, and the vocabulary's.

    python benchmarks/products.py [--threads 2] [--repeats 9]

The four products of a layer of SmolLM2-135M's and of Qwen3-0.6B's shape (projections fused as the engine fuses them),
each with weights of its own until they take 256 MB, so that every weight comes from memory as in a step of a model;
microseconds a layer, in turns: median (minimum-maximum). The bound of few rows is what reading takes, GB/s beside those
of a sum over as many bytes; that of many the rate of VDPBF16PS, in GFLOP/s. It runs wherever there is AVX512_BF16, also
beside AMX, where the engine leaves the products to oneDNN: this is the command that would tell whether it should.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import harness
import torch
from shapes import QWEN3_06B, SMOLLM2_135M
from torch import Tensor

from stemcache.engine.packed import HINTED_ROWS
from stemcache.kernels import bfloat16_pairs, products
from stemcache.kernels.cpu_schedule import has_amx

ROWS = (1, 2, 4, 8, 16, 32, 128, 544, 2080)
BYTES = 256 << 20


def layer_of(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """(outputs, inputs) of a layer's products."""
    hidden, width, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, both = shape["num_attention_heads"] * head, 2 * shape["num_key_value_heads"] * head
    return [(queries + both, hidden), (hidden, queries), (2 * width, hidden), (hidden, width)]


def random(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.bfloat16)


def by_onednn(weight: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, HINTED_ROWS)
    return lambda hidden: torch.ops.mkldnn._linear_pointwise(hidden, packed, None, "none", [], "")


def run(weights: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor]) -> None:
    for i, weight in enumerate(weights):
        weight(inputs[i % len(inputs)])


def measure(name: str, sizes: list[tuple[int, int]], sides: dict[str, list[Any]], rows: int, repeats: int) -> Any:
    """One row of the table; `sides` has the products of each side, layer after layer."""
    inputs = [random(rows, n) for _, n in sizes]
    layers = len(sides["compiled"]) // len(sizes)
    timings = harness.interleave({side: partial(run, each, inputs) for side, each in sides.items()}, repeats=repeats)
    seconds = {side: {k: v / layers for k, v in asdict(t).items()} for side, t in timings.items()}
    weights = sum(outputs * n for outputs, n in sizes)
    ours = seconds["compiled"]["median"]
    return {
        "shape": name,
        "rows": rows,
        "seconds": seconds,
        "onednn / compiled": timings["onednn"].median / timings["compiled"].median,
        "bytes_per_second": 2 * weights / ours,
        "operations_per_second": 2 * rows * weights / ours,
    }


def layers_of(name: str, shape: dict[str, Any], repeats: int) -> list[Any]:
    sizes = layer_of(shape)
    layers = max(1, BYTES // sum(2 * outputs * n for outputs, n in sizes))
    weights = [random(*size) for _ in range(layers) for size in sizes]
    sides = {"compiled": [products.packed(w, None) for w in weights], "onednn": [by_onednn(w) for w in weights]}
    del weights
    return [measure(f"{name}, a layer", sizes, sides, rows, repeats) for rows in ROWS]


def vocabulary_of(name: str, shape: dict[str, Any], repeats: int) -> list[Any]:
    """With the weight as it is, where torch's own product is oneDNN's."""
    weight = random(shape["vocab_size"], shape["hidden_size"])
    sides = {"compiled": [products.plain(weight, None)], "onednn": [partial(torch.nn.functional.linear, weight=weight)]}
    few = [rows for rows in ROWS if rows <= 32]
    return [measure(f"{name}, vocabulary", [tuple(weight.shape)], sides, rows, repeats) for rows in few]


def memory_rate() -> float:
    """Bytes a second of a sum over float32 numbers."""
    numbers, taken = torch.ones(BYTES // 4), []
    for _ in range(7):
        begin = time.perf_counter()
        numbers.sum()
        taken.append(time.perf_counter() - begin)
    return BYTES / sorted(taken)[3]


def cells(result: dict[str, Any]) -> list[str]:
    spans = [
        f"{t['median'] * 1e6:.0f} ({t['low'] * 1e6:.0f}-{t['high'] * 1e6:.0f})" for t in result["seconds"].values()
    ]
    rates = f"{result['bytes_per_second'] / 1e9:.1f}", f"{result['operations_per_second'] / 1e9:.0f}"
    return [f"{result['shape']}, {result['rows']} rows", *spans, f"{result['onednn / compiled']:.2f}", *rates]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if not bfloat16_pairs.can_run():
        raise SystemExit("the compiled kernel needs AVX512_BF16, numba and an OpenMP runtime that can be reached")
    torch.set_num_threads(options.threads)
    results, rate = [], memory_rate()
    for name, shape in (("SmolLM2-135M", SMOLLM2_135M), ("Qwen3-0.6B", QWEN3_06B)):
        results += layers_of(name, shape, options.repeats) + vocabulary_of(name, shape, options.repeats)
    print(
        harness.table(["us", "compiled", "oneDNN", "oneDNN / compiled", "GB/s", "GFLOP/s"], list(map(cells, results)))
    )
    print(f"a sum over memory: {rate / 1e9:.1f} GB/s")
    payload = {"threads": options.threads, "amx": has_amx(), "memory_bytes_per_second": rate, "results": results}
    print(harness.write_results("products", payload))


if __name__ == "__main__":
    main()
