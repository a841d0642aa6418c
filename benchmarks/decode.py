"""Decoding over a shared prefix: tokens per second against transformers' `generate` with its own cache.

    python benchmarks/decode.py

A randomly initialised model of SmolLM2-135M's shape; 1, 8 and 32 sequences with a shared prefix of 2,048 or 4,096
tokens and 32 private tokens each. Transformers gets the prefix's cache ready-made, repeated for each sequence, so
that both sides only decode; its steps are timed by a stopping criterion inside `generate`. The two take turns, a few
steps at a time, each in a process of its own: threads of two teams in one process would not spin (engine/apart.py). The
floor of a step are the bytes that it must read: all weights, the prefix once, and each private part.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from harness import table, write_results
from shapes import cache_of, random_model, random_tokens
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from stemcache import Engine, SamplingParams
from stemcache.engine.apart import apart

PRIVATE = 32


class StepClock(StoppingCriteria):
    """Notes when each step of `generate` ends; never stops it."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.ticks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def our_steps(
    engine: Engine, prompts: list[list[int]], steps: int, salts: Sequence[bytes] | None = None
) -> list[float]:
    """Seconds of each of `steps` decode steps of all prompts together; their prefix is cached. salts: one a prompt."""
    params = SamplingParams(max_tokens=steps + 3, temperature=0, ignore_eos=True)
    salts = salts or [b""] * len(prompts)
    streams = [engine.submit(prompt, params, cache_salt=salt) for prompt, salt in zip(prompts, salts, strict=True)]
    deltas = [iter(stream) for stream in streams]
    ticks = []
    for _ in range(steps + 3):
        for delta in deltas:
            next(delta)
        ticks.append(time.perf_counter())
    # Prompts may have started in two or three steps; the last `steps` gaps have all of them decoding.
    return [after - before for before, after in zip(ticks[-steps - 1 : -1], ticks[-steps:], strict=True)]


class Transformers:
    """The other side: a model, and the cache of a prefix for each sequence of a batch. Lives in its own process."""

    here: Transformers

    def __init__(self, dtype: str) -> None:
        self.model = random_model(dtype)
        self.cache = DynamicCache(config=self.model.config)

    @classmethod
    def begin(cls, dtype: str) -> None:
        cls.here = cls(dtype)

    @classmethod
    def read(cls, prefix: list[int], batch: int) -> None:
        cls.here.cache = cache_of(cls.here.model, prefix)
        cls.here.cache.batch_repeat_interleave(batch)

    @classmethod
    @torch.inference_mode()
    def steps(cls, prompts: list[list[int]], steps: int) -> list[float]:
        """As `our_steps`, of `generate`, which finds the prefix in the cache and leaves it as it was."""
        cache, clock, ids = cls.here.cache, StepClock(), torch.tensor(prompts)
        length = cache.get_seq_length()
        cls.here.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=steps + 1, do_sample=False,
            eos_token_id=None, pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        cache.crop(length - cache.get_seq_length())  # a negative number: tokens to drop
        return [after - before for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]


def measure(
    engine: Engine, others: ProcessPoolExecutor, batch: int, shared: int, rounds: int, steps: int
) -> dict[str, Any]:
    """One row: decode steps of both, in turns."""
    rng = random.Random(batch + shared)
    prefix = random_tokens(rng, shared)
    list(engine.generate([prefix], SamplingParams(max_tokens=1, temperature=0)))
    others.submit(Transformers.read, prefix, batch).result()
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(rounds + 1):
        prompts = [prefix + random_tokens(rng, PRIVATE) for _ in range(batch)]
        mine = our_steps(engine, prompts, steps)
        generate = others.submit(Transformers.steps, prompts, max(2, steps // 2)).result()
        if turn:  # the first round warms up
            ours += mine
            theirs += generate
    engine.clear_cache()
    ours_ms, theirs_ms = (1000 * statistics.median(times) for times in (ours, theirs))
    return {
        "batch": batch,
        "shared": shared,
        "ours_ms": ours_ms,
        "ours_spread_ms": [1000 * min(ours), 1000 * max(ours)],
        "generate_ms": theirs_ms,
        "generate_spread_ms": [1000 * min(theirs), 1000 * max(theirs)],
        "ours_tokens_per_second": 1000 * batch / ours_ms,
        "generate_tokens_per_second": 1000 * batch / theirs_ms,
        "speedup": theirs_ms / ours_ms,
    }


def floor_bytes(weights: int, engine: Engine, batch: int, shared: int) -> int:
    """Bytes that one step cannot avoid to read: the weights once, the prefix once, each private part once."""
    return weights + (shared + batch * PRIVATE) * engine._runner.layout.bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--shared", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        model = apart(partial(random_model, dtype))
        weights = sum(each.numel() * each.element_size() for each in model.parameters())
        process = ProcessPoolExecutor(1, get_context("spawn"), initializer=Transformers.begin, initargs=(dtype,))
        with Engine.from_model(model, pool_bytes=1 << 30) as engine, process as others:
            for shared in options.shared:
                for batch in options.batches:
                    row = {"dtype": dtype, **measure(engine, others, batch, shared, options.rounds, options.steps)}
                    row["bytes_floor_mb"] = floor_bytes(weights, engine, batch, shared) / 1e6
                    results.append(row)
                    # After each, as all of them take long.
                    write_results("decode", {"private": PRIVATE, "results": results})
                    print(
                        f"{dtype} batch {batch} shared {shared}: {row['ours_ms']:.1f} ms a step, generate "
                        f"{row['generate_ms']:.1f} ms, {row['speedup']:.1f} times faster",
                        flush=True,
                    )
    header = ["dtype", "batch", "shared", "ours_ms", "generate_ms", "ours_tokens_per_second", "speedup"]
    cells = [[f"{v:.1f}" if isinstance(v, float) else v for v in (row[name] for name in header)] for row in results]
    print(table(header, cells))


if __name__ == "__main__":
    main()
