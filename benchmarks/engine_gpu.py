"""The engine on a GPU: time to the first token, and tokens per second with a shared prefix and without.

    python benchmarks/engine_gpu.py [--shapes 1B 8B] [--minutes 8]
    python benchmarks/engine_gpu.py --quick        a tiny shape on whatever is there, which shows that it runs

Randomly initialised models of Llama-3.2-1B's and Llama-3.1-8B's shape in bfloat16. A prompt is 2,048 tokens that all
share and 32 of its own. "Without sharing" are the same prompts in caches of their own, which is what a server without
a prefix cache, or one whose kernel reads a shared prefix once a sequence, has to read. The floor of a step that shares
are the weights, the prefix once, and each sequence's own tokens, over the rate at which this GPU copies memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch
from decode import our_steps
from harness import table, write_results
from shapes import random_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from stemcache import Engine, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=8192,
               tie_word_embeddings=True),
    "8B": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
               num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=8192,
               tie_word_embeddings=False),
    "tiny": dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True),
}  # fmt: skip
"""meta-llama/Llama-3.2-1B's and meta-llama/Llama-3.1-8B's config.json, and one to try the script with."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PRIVATE = 32


def loaded(shape: dict[str, Any], device: str, batches: tuple[int, ...]) -> Engine:
    """An engine over random weights, with nearly all of the device's memory as its pool."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, dtype="bfloat16")
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    pool_bytes = int(torch.cuda.mem_get_info()[0] * 0.8) if device == "cuda" else 64 << 20
    return Engine.from_model(model, pool_bytes=pool_bytes, max_step_tokens=8192, max_running=max(batches))


def first_token_seconds(engine: Engine, prompt: list[int]) -> float:
    """From submitting a prompt to its first token."""
    begin = time.perf_counter()
    list(engine.submit(prompt, SamplingParams(max_tokens=1, temperature=0)))
    return time.perf_counter() - begin


def times_to_first_token(engine: Engine, shared: int, repeats: int) -> dict[str, float]:
    """Medians in seconds: a cold prompt, one whose prefix is cached, and its own tokens alone."""
    rng, vocabulary = random.Random(0), engine.vocab_size
    samples: dict[str, list[float]] = {"cold": [], "warm": [], "alone": []}
    for turn in range(repeats + 1):
        prefix = random_tokens(rng, shared, vocabulary)
        cold = first_token_seconds(engine, prefix + random_tokens(rng, PRIVATE, vocabulary))
        warm = first_token_seconds(engine, prefix + random_tokens(rng, PRIVATE, vocabulary))
        alone = first_token_seconds(engine, random_tokens(rng, PRIVATE, vocabulary))
        for name, seconds in (("cold", cold), ("warm", warm), ("alone", alone)):
            samples[name] += [seconds] * bool(turn)  # the first turn warms up
    return {name: statistics.median(values) for name, values in samples.items()}


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.empty(1 << 28 if device == "cuda" else 1 << 24, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * source.numel() / best


def decode_row(engine: Engine, batch: int, shared: int, steps: int, rate: float) -> dict[str, Any]:
    """Tokens per second of a batch, with the prefix shared and, if the pool has room for that, not shared.

    Means of all steps: whoever reads the answers here may fall behind for a step, which a median would not see.
    """
    rng, layout = random.Random(batch), engine.cache.layout
    prefix = random_tokens(rng, shared, engine.vocab_size)
    prompts = [prefix + random_tokens(rng, PRIVATE, engine.vocab_size) for _ in range(batch)]
    engine.clear_cache()
    list(engine.submit(prefix, SamplingParams(max_tokens=0)))
    seconds = statistics.fmean(our_steps(engine, prompts, steps))
    weights = sum(parameter.nbytes for parameter in engine._runner._model.parameters())
    floor = (weights + (shared + batch * (PRIVATE + steps // 2)) * layout.bytes_per_token) / rate
    row = {"batch": batch, "tokens_per_second": batch / seconds, "of_floor": floor / seconds, "not_shared": None}
    chunks = batch * -(-(shared + PRIVATE + steps + 3) // layout.chunk_tokens)
    if chunks <= engine.stats().store.total_chunks:
        engine.clear_cache()
        salts = [b"%d" % i for i in range(batch)]
        for prompt, salt in zip(prompts, salts, strict=True):  # all are read before any is answered
            list(engine.submit(prompt, SamplingParams(max_tokens=0), cache_salt=salt))
        row["not_shared"] = batch / statistics.fmean(our_steps(engine, prompts, steps, salts))
    return row


def shown(value: float | None) -> str:
    """A figure of a table."""
    return "no room" if value is None else f"{value:,.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["1B", "8B"])
    parser.add_argument("--minutes", type=float, default=8, help="then no further batch size begins (%(default)s)")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        raise SystemExit("there is no GPU here; --quick tries the script with a tiny model on the CPU")
    shapes, batches, shared = (["tiny"], (1, 2), 64) if options.quick else (options.shapes, BATCHES, 2048)
    deadline, rate = time.monotonic() + 60 * options.minutes, copy_rate(device)
    figures = []
    for name in shapes:
        with loaded(SHAPES[name], device, batches) as engine:
            first = times_to_first_token(engine, shared, repeats=5)
            print(f"{name}: TTFT cold {first['cold']:.4f} s, warm {first['warm']:.4f}, alone {first['alone']:.4f}")
            rows = []
            for batch in batches:
                if time.monotonic() < deadline:
                    rows.append(decode_row(engine, batch, shared, 3 if options.quick else 32, rate))
            graphs = engine._runner.graphs
            replayed = graphs.replayed if graphs is not None else 0
        print(table(list(rows[0]), [[row["batch"], *map(shown, list(row.values())[1:])] for row in rows]))
        print(f"{replayed} steps were replays of captured graphs")
        figures.append({"shape": name, "ttft": first, "decode": rows, "replayed": replayed})
    if not options.quick:
        gpu = torch.cuda.get_device_name()
        payload = {"gpu": gpu, "copy_rate": rate, "shared": shared, "private": PRIVATE, "figures": figures}
        print(write_results(f"engine-{gpu.replace(' ', '-').lower()}", payload))


if __name__ == "__main__":
    main()
