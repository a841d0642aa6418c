"""What the context cache saves: exact match and time to first token, policy by policy, on the same questions.

    python benchmarks/rag_timing.py demo|long|search [--questions N] [--pool 0.5] [--quick]

demo: 500 documents of 60 tokens and the demo model, which answers; exact match counts, and how many answers are those
      of the same prompt without any cache (another order of the documents is another prompt).
long: 200 documents of 300 to 600 tokens and a random model of SmolLM2-135M's shape; times only.
search: `long`, among so many other vectors that searching takes as long as computing; speculation off and on.

Popularity by Zipf, k=4, one question after another; each goes to every configuration in turn, so that a busy machine
slows all of them alike. A time is that from the question to the first token, retrieval included: by the clock, and as
processor time, from which other processes take nothing. They are the same on an idle machine, as one thread waits for
the other (with OMP_NUM_THREADS=1); but with speculation they work at once, so only the clock counts for it.

The pool is a share of what the corpus's keys and values take. The first questions warm the caches up and are not
counted; with the random model they are not computed either, only entered: nobody reads its answers. Writes
results/rag_timing-NAME.json.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import transformers
from harness import table, write_results
from rag_workload import Corpus, long_corpus, questions, short_corpus
from shapes import random_model
from slow_index import slow_index
from transformers import AutoTokenizer

from stemcache import Engine, SamplingParams
from stemcache.engine.blend import SHARE
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, Fact, is_right
from stemcache.ragcache.calibration import Verdict, demo_questions
from stemcache.ragcache.context_cache import ContextCache
from stemcache.ragcache.preparation import Wish

K = 4


@dataclass(frozen=True, slots=True)
class Configuration:
    """One way to serve. every: only each so many-th question, where all questions cost the same."""

    name: str
    eviction: str = "lru"
    order: str = "relevance"
    reuse: str = "prefix"
    is_cached: bool = True
    speculate: bool = False
    every: int = 1


CONFIGURATIONS = (
    Configuration("no cache", is_cached=False),
    Configuration("lru"),
    Configuration("pgdsf", eviction="pgdsf"),
    Configuration("lru, cache order", order="cache"),
    Configuration("pgdsf, cache order", eviction="pgdsf", order="cache"),
    Configuration("pgdsf, cache order, speculation", eviction="pgdsf", order="cache", speculate=True),
    Configuration("pgdsf, blend", eviction="pgdsf", reuse="blend"),
)


@dataclass(slots=True)
class Served:
    """A configuration with its engine, and what it took. `seconds` and `cpu_seconds` are those to the first token."""

    configuration: Configuration
    engine: Engine
    cache: ContextCache
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    preparing: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    right: int = 0
    same: int = 0

    def ask(self, fact: Fact, params: SamplingParams, plain: Engine | None = None, *, counted: bool = True) -> None:
        """One question, as `ContextCache.ask` does it, with a clock beside it. `plain` computes the same prompt."""
        if not self.configuration.is_cached:
            self.engine.clear_cache()
        submit = partial(_submit, self.engine, params)
        begin, cpu = time.perf_counter(), time.process_time()
        prepared = self.cache.prepare(
            self.cache._messages(fact.question),
            fact.question,
            Wish(k=K, order=self.configuration.order, reuse=self.configuration.reuse),  # type: ignore[arg-type]
            answer_tokens=params.max_tokens or 1,
            submit=submit,
        )
        ready = time.perf_counter()
        with prepared.stream or submit(prepared.tokens, blend=prepared.blend) as stream:
            deltas = iter(stream)
            text = next(deltas).text
            first, cpu_first = time.perf_counter(), time.process_time()
            text += "".join(delta.text for delta in deltas)
        if counted:
            self.seconds.append(first - begin)
            self.cpu_seconds.append(cpu_first - cpu)
            self.preparing.append(ready - begin)
            self.prompt_tokens += stream.usage.prompt_tokens
            self.cached_tokens += stream.usage.cached_tokens + stream.usage.moved_tokens
            self.right += is_right(fact, text)
            self.same += plain is not None and text == _computed(plain, prepared.tokens, params)

    def row(self) -> dict[str, Any]:
        return {
            "configuration": self.configuration.name,
            "questions": len(self.seconds),
            "exact_match": self.right / len(self.seconds),
            "same_as_computed": self.same / len(self.seconds),
            "hit_tokens": self.cached_tokens / self.prompt_tokens,
            "seconds": _spread(self.seconds),
            "cpu_seconds": _spread(self.cpu_seconds),
            "preparing": median(self.preparing),
        }


def _spread(samples: Sequence[float]) -> dict[str, float]:
    cuts = (10, 50, 90, 99)
    values = np.percentile(samples, cuts).tolist()
    return {"mean": mean(samples), **{f"p{cut}": value for cut, value in zip(cuts, values, strict=True)}}


def _submit(engine: Engine, params: SamplingParams, tokens: Sequence[int], tentative: Any = None, **more: Any) -> Any:
    return engine.submit(tokens, params, tentative=tentative, **more)


def _computed(engine: Engine, tokens: Sequence[int], params: SamplingParams) -> str:
    engine.clear_cache()
    (completion,) = engine.generate([tokens], params)
    return completion.text


def _allow_blend(one: Served, kind: str) -> None:
    if kind == "demo":
        one.cache.blending.switch_on(demo_questions())
        one.engine.clear_cache()
    else:  # which the gate refuses, as it should: nobody reads a random model's answers, only the time counts here
        one.cache.blending.verdict = Verdict(SHARE, 1, 1, 1, 1, 1)


@contextmanager
def served(kind: str, corpus: Corpus, pool: float, configurations: Sequence[Configuration]) -> Iterator[list[Served]]:
    """The configurations, each with an engine, a pool and a catalogue of its own, and the random model in common."""
    with ExitStack() as stack:
        tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
        lengths = [len(tokenizer.encode(each.text)) for each in corpus.documents]
        print(f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens, {mean(lengths):.0f} on average")
        model = None if kind == "demo" else random_model("bfloat16")
        made = []
        for each in configurations:
            if model is None:
                load, chunk = partial(Engine.load, MODEL_PATH, dtype="float32"), 16
            else:
                load, chunk = partial(Engine.from_model, model, tokenizer), 64
            with load(pool_bytes=64 << 20, chunk_tokens=chunk) as probe:
                tokens = int(pool * sum(lengths)) if each.is_cached else 2 * K * max(lengths)
                room = tokens * probe._runner.layout.bytes_per_token
            engine = stack.enter_context(load(pool_bytes=room, chunk_tokens=chunk, eviction=each.eviction))
            cache = ContextCache(
                engine, system_prompt=SYSTEM_PROMPT, passage_tokens=None, index="ivf", speculate=each.speculate
            )
            stack.enter_context(cache).add(corpus.documents)
            made.append(Served(each, engine, cache))
            if each.reuse == "blend":
                _allow_blend(made[-1], kind)
        yield made
        for one in made:
            one.engine.check()


@contextmanager
def uncomputed(engine: Engine) -> Iterator[None]:
    """Steps enter their chunks, whose keys and values are then anything; and nothing is learned of their times."""
    run, observe = engine._runner.run, engine.cost.observe

    def skip(step: Any) -> torch.Tensor:
        return torch.zeros(sum(len(entry.logits) for entry in step), engine.vocab_size)

    engine._runner.run, engine.cost.observe = skip, lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine._runner.run, engine.cost.observe = run, observe  # type: ignore[method-assign]


def warm_up(everyone: Sequence[Served], asked: Sequence[Fact], params: SamplingParams, *, computed: bool) -> None:
    for one in everyone:
        if not one.configuration.is_cached:
            continue
        head = 0 if computed else 1  # this one is computed, so that the engine knows what steps cost
        with ExitStack() as stack:
            for number, fact in enumerate(asked):
                if number == head and not computed:
                    stack.enter_context(uncomputed(one.engine))
                one.ask(fact, params, counted=False)


def measure(
    everyone: Sequence[Served], asked: Sequence[Fact], params: SamplingParams, plain: Engine | None = None
) -> None:
    """Each question goes to all configurations, beginning with another one each time."""
    begin = time.perf_counter()
    for number, fact in enumerate(asked):
        turn = number % len(everyone)
        for one in (*everyone[turn:], *everyone[:turn]):
            if number % one.configuration.every == 0:
                one.ask(fact, params, plain)
        if number % 10 == 9:
            print(f"{number + 1} of {len(asked)} questions, {time.perf_counter() - begin:.0f} s", flush=True)


def show(rows: Sequence[dict[str, Any]], clock: str, *, answers: bool) -> None:
    """The table, by `seconds` or `cpu_seconds`."""
    none, lru = (
        next((row[clock]["mean"] for row in rows if row["configuration"] == name), None) for name in ("no cache", "lru")
    )
    cells = []
    for row in rows:
        times = [f"{1000 * row[clock][name]:.0f}" for name in ("mean", "p50", "p90", "p99")]
        ratios = [f"{base / row[clock]['mean']:.2f}" if base else "" for base in (none, lru)]
        match = [f"{row['exact_match']:.1%}", f"{row['same_as_computed']:.1%}"] if answers else []
        cells.append([row["configuration"], *match, f"{row['hit_tokens']:.0%}", *times, *ratios])
    header = [
        f"ms to first token ({clock})",
        *(["exact", "same"] if answers else []),
        "hit",
        "mean",
        "p50",
        "p90",
        "p99",
    ]
    print(table([*header, "no cache / it", "lru / it"], cells), flush=True)


def policies(kind: str, options: argparse.Namespace) -> None:
    """All configurations."""
    is_demo = kind == "demo"
    n = options.documents or (500 if is_demo else 200)
    corpus = short_corpus(n) if is_demo else long_corpus(n)
    # No cache takes the same for every question. What speculation does is what `search` is about.
    configurations = [
        replace(each, every=1 if is_demo or each.is_cached else 5)
        for each in CONFIGURATIONS
        if is_demo or not each.speculate
    ]
    params = SamplingParams(max_tokens=24 if is_demo else 1, temperature=0)
    asked = questions(corpus, options.warmup + options.questions, seed=1)
    with served(kind, corpus, options.pool, configurations) as everyone:
        warm_up(everyone, asked[: options.warmup], params, computed=is_demo)
        plain = everyone[0].engine if is_demo else None  # the one without a cache
        measure(everyone, asked[options.warmup :], params, plain)
        rows = [one.row() for one in everyone]
    for clock in ("cpu_seconds", "seconds"):
        show(rows, clock, answers=is_demo)
    _write(f"rag_timing-{kind}-{options.pool:g}", options, {"documents": n, "rows": rows})


def searches(options: argparse.Namespace) -> None:
    """Speculation off and on, by how long a search takes."""
    corpus = long_corpus(options.documents or 200)
    off, on = (each for each in CONFIGURATIONS if each.name.startswith("pgdsf, cache order"))
    params = SamplingParams(max_tokens=1, temperature=0)
    asked = questions(corpus, options.warmup + 3 * options.questions, seed=1)
    rest = iter(asked[options.warmup :])
    rows = []
    with served("long", corpus, options.pool, [off, on]) as everyone:
        warm_up(everyone, asked[: options.warmup], params, computed=False)
        vectors = slow_index(everyone[0].cache, options.vectors)
        for n_probe in (64, 256, 1024):
            for one in everyone:
                one.cache._library._indexes[""] = vectors(n_probe)
                for samples in (one.seconds, one.cpu_seconds, one.preparing):
                    samples.clear()
                for fact in random.Random(2).sample(list(asked), 4):  # what the gate learns from
                    one.ask(fact, params, counted=False)
            before = everyone[1].cache.speculation()
            measure(everyone, [next(rest) for _ in range(options.questions)], params)
            after = everyone[1].cache.speculation()
            for one in everyone:
                rows.append(one.row() | {"n_probe": n_probe})
            rows[-1]["speculations"] = {
                name: getattr(after, name) - getattr(before, name) for name in ("started", "stood", "cancelled")
            }
            print(rows[-1]["speculations"], "saved", after.saved_seconds - before.saved_seconds, flush=True)
    show(rows, "seconds", answers=False)
    _write("rag_timing-search", options, {"rows": rows})


def _write(name: str, options: argparse.Namespace, payload: dict[str, Any]) -> None:
    if not options.quick:
        settings = {"k": K, "pool": options.pool, "warmup": options.warmup, "questions": options.questions}
        print(write_results(name, settings | payload))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["demo", "long", "search"])
    parser.add_argument("--questions", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--pool", type=float, default=0.5, help="of the corpus's keys and values (default: 0.5)")
    parser.add_argument("--vectors", type=int, default=300_000, help="of `search` (default: 300,000)")
    parser.add_argument("--quick", action="store_true", help="a few questions; writes nothing")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    usual = {"demo": (1000, 500), "long": (100, 400), "search": (20, 400)}[options.kind]
    quick = {"demo": (30, 30), "long": (4, 40), "search": (3, 20)}[options.kind]
    given = (options.questions, options.warmup)
    options.questions, options.warmup = (
        want if want is not None else default
        for want, default in zip(given, quick if options.quick else usual, strict=True)
    )
    searches(options) if options.kind == "search" else policies(options.kind, options)


if __name__ == "__main__":
    main()
