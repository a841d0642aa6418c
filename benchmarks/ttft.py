"""Time to first token with and without a cached prefix, and the memory of one more sharer.

    python benchmarks/ttft.py

A prompt of 2,048 shared and 32 private tokens on a randomly initialised model of SmolLM2-135M's shape. What bounds
it: a warm prompt has to compute its 32 private tokens, so the same model reading 32 tokens alone is the floor; a cold
one is a forward pass over all tokens, so transformers' own forward is. Both are measured in the same interleaved run.
"""

from __future__ import annotations

import argparse
import copy
import random
from typing import Any

import torch
from harness import interleave, table, write_results
from shapes import cache_of, paired, random_tokens
from transformers import PreTrainedModel

from stemcache import Engine, SamplingParams

ONE = SamplingParams(max_tokens=1, temperature=0)


def first_token(engine: Engine, prompt: list[int]) -> int:
    """Run a prompt up to its first token; returns the cached tokens."""
    (completion,) = engine.generate([prompt], ONE)
    return completion.usage.cached_tokens


def measure(dtype: str, shared: int, private: int, repeats: int) -> dict[str, Any]:
    """All columns of one dtype."""
    rng = random.Random(0)
    prefix = random_tokens(rng, shared)
    with paired(dtype, pool_bytes=1 << 30) as (engine, own):
        cache = cache_of(own, prefix)

        def cold() -> None:
            engine.clear_cache()
            assert first_token(engine, prefix + random_tokens(rng, private)) == 0

        def warm() -> None:  # `cold` ran just before and left the prefix
            assert first_token(engine, prefix + random_tokens(rng, private)) >= shared

        def alone() -> None:
            assert first_token(engine, random_tokens(rng, private)) < 16

        timings = interleave(
            {
                "cold": cold,
                "warm": warm,
                "private alone": alone,
                "transformers forward": lambda: forward(own, prefix + random_tokens(rng, private)),
                "transformers, copied cache": lambda: forward_cached(own, cache, random_tokens(rng, private)),
            },
            repeats=repeats,
            warmup=1,
        )
        growth = sharer_growth(engine, prefix, private, rng)
    medians = {name: timing.median for name, timing in timings.items()}
    return {
        "dtype": dtype,
        "seconds": {name: [t.low, t.median, t.high] for name, t in timings.items()},
        "warm / private alone": medians["warm"] / medians["private alone"],
        "cold / transformers forward": medians["cold"] / medians["transformers forward"],
        "cold / warm": medians["cold"] / medians["warm"],
        "warm / transformers, copied cache": medians["warm"] / medians["transformers, copied cache"],
        **growth,
    }


@torch.inference_mode()
def forward(model: PreTrainedModel, tokens: list[int]) -> None:
    """Transformers' own prefill: what a cold prompt costs there."""
    model(torch.tensor([tokens]), use_cache=True, logits_to_keep=1)


@torch.inference_mode()
def forward_cached(model: PreTrainedModel, cache: Any, tokens: list[int]) -> None:
    """Transformers' way to reuse a prefix: copy its cache, then go on."""
    model(torch.tensor([tokens]), past_key_values=copy.deepcopy(cache), use_cache=True, logits_to_keep=1)


def sharer_growth(engine: Engine, prefix: list[int], private: int, rng: random.Random) -> dict[str, Any]:
    """Slots that eight further sharers take while they run, beside one that already does."""
    held = []
    streams = []
    for _ in range(9):
        streams.append(
            engine.submit(prefix + random_tokens(rng, private), SamplingParams(max_tokens=24, temperature=0))
        )
        next(iter(streams[-1]))
        held.append(engine.stats().store.leased_chunks)
    for stream in streams:
        stream.cancel()
    layout = engine._runner.layout
    chunks = (held[-1] - held[0]) / 8
    return {
        "chunks of one more sharer": chunks,
        "bytes of one more sharer": chunks * layout.bytes_per_chunk,
        "bytes of its private tokens": private * layout.bytes_per_token,
        "bytes of a whole copy": (len(prefix) + private) * layout.bytes_per_token,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=int, default=2048)
    parser.add_argument("--private", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = []
    for dtype in ("float32", "bfloat16"):
        print(f"{dtype}: {options.shared} shared and {options.private} private tokens", flush=True)
        result = measure(dtype, options.shared, options.private, options.repeats)
        results.append(result)
        rows = [[name, *(f"{1000 * s:.1f}" for s in seconds)] for name, seconds in result["seconds"].items()]
        print(table(["milliseconds to the first token", "low", "median", "high"], rows))
        for name, value in result.items():
            if isinstance(value, float | int):
                print(f"  {name}: {value:.4g}")
    write_results("ttft", {"shared": options.shared, "private": options.private, "results": results})


if __name__ == "__main__":
    main()
