"""A step's forward pass in bfloat16 with compiled layers, beside the same with transformers' own layers.

    python benchmarks/layers.py [--threads 2] [--repeats 9] [--products compiled]

Random models of SmolLM2-135M's and Qwen3-0.6B's shape, one engine's runner each, whose layers are switched in turns:
milliseconds a step, median (minimum-maximum). Both sides have the same attention and the same products, which are the
compiled ones or, with `--products onednn`, what a processor with AMX has. The bound of few rows is reading the weights:
GB/s counts those alone. It runs wherever there is AVX512_BF16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import harness
import numpy as np
import torch
from shapes import QWEN3_06B, SMOLLM2_135M
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.models.llama import LlamaConfig

from stemcache.engine import attention
from stemcache.engine.compiled_layers import CompiledLayer
from stemcache.engine.runner import ModelRunner
from stemcache.kernels import bfloat16_pairs, fused, products
from stemcache.kernels.cpu_schedule import has_amx
from stemcache.kernels.plan import SequenceRows

CHUNK = 64
STEPS = [(1, 512, 1), (8, 512, 1), (32, 512, 1), (1, 0, 32), (1, 2048, 32), (1, 0, 256), (1, 0, 1914)]
"""Sequences, tokens that they share, new tokens of each."""
Step = Callable[[], object]


def runner_of(config: Any) -> tuple[ModelRunner, PreTrainedModel, int]:
    attention.register()
    config._attn_implementation = attention.NAME
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention.NAME).eval()
    n_bytes = 2 * sum(parameter.numel() for parameter in model.parameters())  # before they are packed
    return ModelRunner(model, pool_bytes=512 << 20, chunk_tokens=CHUNK, max_running=32), model, n_bytes


def step_of(runner: ModelRunner, sequences: int, shared: int, new: int) -> Step:
    """Each sequence has the shared chunks, and its own after them."""
    prefix, own = shared // CHUNK, -(-new // CHUNK)
    chunks = [[*range(prefix), *range(prefix + i * own, prefix + (i + 1) * own)] for i in range(sequences)]
    rows = [SequenceRows(np.array(each, dtype=np.int32), shared, shared + new) for each in chunks]
    tokens = [i * 7919 % runner.vocab_size for i in range(sequences * new)]
    return partial(runner._run, rows, tokens, [(i + 1) * new - 1 for i in range(sequences)])


def with_layers(forwards: dict[torch.nn.Module, CompiledLayer | None], step: Step) -> None:
    for layer, forward in forwards.items():
        layer.__dict__.pop("forward", None)
        if forward is not None:
            layer.forward = forward  # type: ignore[assignment]
    step()


def measure(name: str, runner: ModelRunner, model: PreTrainedModel, n_bytes: int, repeats: int) -> list[dict[str, Any]]:
    compiled = {layer: layer.forward for layer in model.model.layers}
    assert all(isinstance(forward, CompiledLayer) for forward in compiled.values())
    plain = dict.fromkeys(compiled)
    results = []
    for sequences, shared, new in STEPS:
        step = step_of(runner, sequences, shared, new)
        sides = {"compiled": partial(with_layers, compiled, step), "transformers": partial(with_layers, plain, step)}
        timings = harness.interleave(sides, repeats=repeats)
        results.append(
            {
                "shape": name, "sequences": sequences, "shared": shared, "new": new,
                "seconds": {side: asdict(timing) for side, timing in timings.items()},
                "transformers / compiled": timings["transformers"].median / timings["compiled"].median,
                "bytes_per_second": n_bytes / timings["compiled"].median,
            }
        )  # fmt: skip
    return results


def cells(result: dict[str, Any]) -> list[str]:
    spans = [
        f"{t['median'] * 1e3:.1f} ({t['low'] * 1e3:.1f}-{t['high'] * 1e3:.1f})" for t in result["seconds"].values()
    ]
    step = f"{result['sequences']} x {result['new']} new, {result['shared']} shared"
    ratio, rate = result["transformers / compiled"], result["bytes_per_second"] / 1e9
    return [f"{result['shape']}, {step}", *spans, f"{ratio:.2f}", f"{rate:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--products", choices=["compiled", "onednn"], help="by default those that the engine chooses")
    options = parser.parse_args()
    if not bfloat16_pairs.can_run():
        raise SystemExit("compiled layers need AVX512_BF16, numba and an OpenMP runtime that can be reached")
    if options.products:
        for module in (products, fused):
            module.is_preferred = lambda: options.products == "compiled"  # type: ignore[attr-defined]
    torch.set_num_threads(options.threads)
    results = []
    for name, config in (("SmolLM2-135M", LlamaConfig(**SMOLLM2_135M)), ("Qwen3-0.6B", Qwen3Config(**QWEN3_06B))):
        results += measure(name, *runner_of(config), options.repeats)
    print(harness.table(["ms", "compiled", "transformers", "ratio", "GB/s"], list(map(cells, results))))
    chosen = "compiled" if products.is_preferred() else "onednn"
    payload = {"threads": options.threads, "amx": has_amx(), "products": chosen, "results": results}
    print(harness.write_results("layers" if options.products is None else f"layers-{chosen}", payload))


if __name__ == "__main__":
    main()
