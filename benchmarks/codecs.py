"""What each codec costs: bits, time, and answers.

    python benchmarks/codecs.py                    1,000 held-out questions for each codec
    python benchmarks/codecs.py --questions 100

Speed and size on chunks of SmolLM2-135M's shape, whose keys and values a forward pass with random weights makes, and on
the demo model's own, eight consecutive chunks with the sinks in the first; process time of one thread, raw bytes.
Answers: the demo model reads every prompt, all its cached chunks pass through the codec, and it answers from what came
back. That is compared with the same prompts' exact run, question by question, and logit by logit at the positions that
both runs reach with the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from answers import questions
from harness import interleave, table, write_results
from rich.progress import track
from shapes import random_model, random_tokens
from torch import Tensor

from stemcache import Engine, SamplingParams
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import is_right
from stemcache.engine.scheduler import Scheduled
from stemcache.prefixtree.codecs.codec import SINK_TOKENS, Codec
from stemcache.prefixtree.codecs.registry import CODEC_NAMES, get_codec
from stemcache.prefixtree.layout import KVLayout

ONE = SamplingParams(max_tokens=1, temperature=0)
ANSWER = SamplingParams(max_tokens=48, temperature=0)


@dataclass(frozen=True, slots=True)
class Variant:
    """A codec, read to its last level or to an earlier one."""

    codec: Codec
    levels: int | None = None

    @property
    def name(self) -> str:
        return self.codec.name if self.levels is None else f"{self.codec.name}, level {self.levels}"

    def encode(self, chunk: Tensor, sinks: int) -> list[Any]:
        return self.codec.encode(chunk, sinks=sinks)[: self.levels]


def variants() -> list[Variant]:
    """All codecs, the progressive one at each of its levels."""
    plain = [Variant(get_codec(name)) for name in CODEC_NAMES if name != "cachegen"]
    return plain + [Variant(get_codec("cachegen"), levels) for levels in (1, 2, 3)]


def cached_chunks(engine: Engine) -> list[tuple[int, int]]:
    """Slot and number of sinks of every cached chunk."""
    nodes = engine._loop.store._ledger.tree.nodes()
    return [(node.slot, SINK_TOKENS if node.depth == 1 else 0) for node in nodes if node.depth > 0]


# --- speed and size ---------------------------------------------------------------------------------------------------


def chunks_of(engine: Engine, prompts: Sequence[list[int]], count: int) -> list[tuple[Tensor, int]]:
    """Chunks, and their sinks, of what the engine computes for the prompts."""
    list(engine.generate(prompts, ONE))
    pool = engine._runner.pool
    return engine._loop.call(lambda: [(pool.read_chunk(slot), sinks) for slot, sinks in cached_chunks(engine)[:count]])


def error(chunks: Sequence[Tensor], decoded: Sequence[Tensor], which: int) -> float:
    """Length of the error over the length of the keys (0) or values (1)."""
    exact = torch.stack([chunk[:, which] for chunk in chunks]).double()
    found = torch.stack([chunk[:, which] for chunk in decoded]).double()
    return float((found - exact).norm() / exact.norm())


def speed(chunks: list[tuple[Tensor, int]], layout: KVLayout, repeats: int) -> list[dict[str, Any]]:
    """One row a codec; all codecs are timed in turns."""
    tensors = [chunk for chunk, _ in chunks]
    encoded = {v.name: [v.encode(chunk, sinks) for chunk, sinks in chunks] for v in variants()}
    turn = itertools.cycle(range(len(chunks)))

    def encode(variant: Variant) -> None:
        chunk, sinks = chunks[next(turn)]
        variant.encode(chunk, sinks)

    def decode(variant: Variant) -> None:
        i = next(turn)
        variant.codec.decode(encoded[variant.name][i], layout, sinks=chunks[i][1])

    calls = {f"{v.name} encode": lambda v=v: encode(v) for v in variants()}
    calls |= {f"{v.name} decode": lambda v=v: decode(v) for v in variants()}
    timings = interleave(calls, repeats=repeats, clock=time.process_time)
    rows = []
    for variant in variants():
        stored = sum(len(level) for levels in encoded[variant.name] for level in levels) / len(chunks)
        decoded = [
            variant.codec.decode(levels, layout, sinks=sinks)
            for levels, (_, sinks) in zip(encoded[variant.name], chunks, strict=True)
        ]
        rows.append(
            {
                "codec": variant.name,
                "bits per value": 8 * stored / tensors[0].numel(),
                "ratio": layout.bytes_per_chunk / stored,
                "encode GB/s": layout.bytes_per_chunk / timings[f"{variant.name} encode"].median / 1e9,
                "decode GB/s": layout.bytes_per_chunk / timings[f"{variant.name} decode"].median / 1e9,
                "error of keys": error(tensors, decoded, 0),
                "error of values": error(tensors, decoded, 1),
            }
        )
    return rows


# --- answers ----------------------------------------------------------------------------------------------------------


class Logits:
    """Remembers what the engine's model said after each sequence of tokens."""

    def __init__(self, engine: Engine) -> None:
        self.after: dict[tuple[int, ...], Tensor] = {}
        self._run = engine._runner.run
        engine._runner.run = self._record  # type: ignore[method-assign]

    def _record(self, step: Sequence[Scheduled]) -> Tensor:
        logits = self._run(step)
        places = ((entry.sequence, position) for entry in step for position in entry.logits)
        for row, (sequence, position) in zip(logits, places, strict=True):
            self.after[tuple(sequence.tokens[: position + 1])] = row.clone()
        return logits

    def take(self) -> dict[tuple[int, ...], Tensor]:
        taken, self.after = self.after, {}
        return taken


@dataclass(slots=True)
class Shift:
    """How far answers and logits are from the exact ones."""

    right: int = 0
    same_text: int = 0
    asked: int = 0
    positions: int = 0
    same_token: int = 0
    divergence: float = 0.0
    largest: float = 0.0
    squares: float = 0.0

    def ask(self, batch: Sequence[tuple[Any, Any]], texts: list[str], exact: list[str]) -> None:
        """Count right answers, and those that are the exact run's."""
        self.asked += len(batch)
        self.right += sum(is_right(fact, text) for (fact, _), text in zip(batch, texts, strict=True))
        self.same_text += sum(a == b for a, b in zip(texts, exact, strict=True))

    def add(self, exact: dict[tuple[int, ...], Tensor], found: dict[tuple[int, ...], Tensor]) -> None:
        """Compare log-probabilities at the positions that both runs reached with the same tokens."""
        common = [key for key in found if key in exact]
        left = torch.stack([exact[key] for key in common]).double().log_softmax(-1)
        right = torch.stack([found[key] for key in common]).double().log_softmax(-1)
        self.positions += len(common)
        self.same_token += int((left.argmax(-1) == right.argmax(-1)).sum())
        self.divergence += float((left.exp() * (left - right)).sum())
        self.largest = max(self.largest, float((left - right).abs().max()))
        self.squares += float((left - right).square().mean(-1).sum())

    def row(self) -> dict[str, Any]:
        return {
            "exact match": self.right / self.asked,
            "same answer as exact": self.same_text / self.asked,
            "same next token": self.same_token / self.positions,
            "KL divergence": self.divergence / self.positions,
            "RMS shift of log-probabilities": (self.squares / self.positions) ** 0.5,
            "largest shift": self.largest,
            "positions": self.positions,
        }


def prefixes(prompt: list[int], size: int) -> Iterator[tuple[int, ...]]:
    """The tokens up to the end of each whole chunk."""
    return (tuple(prompt[:end]) for end in range(size, len(prompt) + 1, size))


def read_cache(engine: Engine, prompts: Sequence[list[int]]) -> dict[tuple[int, ...], Tensor]:
    """Every cached chunk of the prompts, by the tokens up to its end."""
    pool, store = engine._runner.pool, engine._loop.store
    chunks: dict[tuple[int, ...], Tensor] = {}

    def run() -> None:
        for prompt in prompts:
            with store.acquire(prompt, engine.namespace()) as lease:
                for i, key in enumerate(prefixes(prompt[: lease.cached_tokens], store.chunk_tokens)):
                    if key not in chunks:
                        chunks[key] = pool.read_chunk(lease.slots[i])

    engine._loop.call(run)
    return chunks


def fill_cache(engine: Engine, prompts: Sequence[list[int]], chunks: dict[tuple[int, ...], Tensor]) -> None:
    """Make these chunks the whole cache, as a tier that is read does."""
    engine.clear_cache()
    pool, store = engine._runner.pool, engine._loop.store

    def run() -> None:
        for prompt in prompts:
            keys = [key for key in prefixes(prompt, store.chunk_tokens) if key in chunks]
            with store.acquire(prompt[: len(keys) * store.chunk_tokens], engine.namespace()) as lease:
                lease.reserve(len(keys) * store.chunk_tokens)
                for i in range(lease.cached_tokens // store.chunk_tokens, len(keys)):
                    pool.write_chunk(lease.slots[i], chunks[keys[i]])
                lease.commit(prompt[: len(keys) * store.chunk_tokens])

    engine._loop.call(run)


def pass_through(variant: Variant, chunks: dict[tuple[int, ...], Tensor], layout: KVLayout) -> dict[Any, Tensor]:
    """Return what the codec makes of each chunk."""
    passed = {}
    for key, chunk in chunks.items():
        sinks = SINK_TOKENS if len(key) == layout.chunk_tokens else 0
        passed[key] = variant.codec.decode(variant.encode(chunk, sinks), layout, sinks=sinks)
    return passed


def batches(documents: int, count: int, seed: int) -> Iterator[list[Any]]:
    """Facts and chats, forty at a time."""
    flat = itertools.islice(itertools.chain.from_iterable(questions(random.Random(seed), documents, count)), count)
    while batch := list(itertools.islice(flat, 40)):
        yield batch


def answers(engine: Engine, documents: int, count: int, seed: int = 1) -> dict[str, Shift]:
    """Ask every question of the exact cache and of each variant's."""
    shifts = {"no codec": Shift()} | {variant.name: Shift() for variant in variants()}
    logits = Logits(engine)
    for batch in track(list(batches(documents, count, seed)), description=f"{documents} documents"):
        prompts = [engine.encode_chat(**chat) for _, chat in batch]
        engine.clear_cache()
        exact_texts = [completion.text for completion in engine.generate(prompts, ANSWER)]
        exact_logits, chunks = logits.take(), read_cache(engine, prompts)
        shifts["no codec"].ask(batch, exact_texts, exact_texts)
        shifts["no codec"].add(exact_logits, exact_logits)
        for variant in variants():
            fill_cache(engine, prompts, pass_through(variant, chunks, engine._runner.layout))
            completions = list(engine.generate(prompts, ANSWER))
            assert all(c.usage.prompt_tokens - c.usage.cached_tokens <= engine.cache.chunk_tokens for c in completions)
            shifts[variant.name].ask(batch, [completion.text for completion in completions], exact_texts)
            shifts[variant.name].add(exact_logits, logits.take())
    return shifts


# --- the tables -------------------------------------------------------------------------------------------------------


def show(title: str, rows: list[dict[str, Any]]) -> None:
    header = list(rows[0])
    cells = [[f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in header] for row in rows]
    print(f"\n{title}\n{table(header, cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    results: dict[str, Any] = {}
    with Engine.from_model(random_model("bfloat16"), pool_bytes=1 << 26) as engine:
        layout = engine._runner.layout
        chunks = chunks_of(engine, [random_tokens(rng, 8 * layout.chunk_tokens + 1)], 8)
    results["SmolLM2-135M's shape"] = speed(chunks, layout, options.repeats)
    show("SmolLM2-135M's shape, random weights, bfloat16", results["SmolLM2-135M's shape"])
    with Engine.load(MODEL_PATH) as engine:
        layout = engine._runner.layout
        batch = next(batches(options.documents, 40, seed=2))
        chunks = chunks_of(engine, [engine.encode_chat(**chat) for _, chat in batch], 8)
        results["demo model"] = speed(chunks, layout, options.repeats)
        show("the demo model, float32", results["demo model"])
        shifts = answers(engine, options.documents, options.questions)
    results["answers"] = [{"codec": name, **shift.row()} for name, shift in shifts.items()]
    show(f"{options.questions} held-out questions over {options.documents} documents", results["answers"])
    write_results("codecs", {"questions": options.questions, "documents": options.documents, **results})


if __name__ == "__main__":
    main()
