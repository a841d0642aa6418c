"""What moving documents costs in answers, and what it spares in time.

    python benchmarks/blend.py

Answers: exact match of the demo model on held-out facts, with shares of each moved document computed again, against
full computation of the same prompts; eight documents in random order, of a corpus of 500 (goal: within one point at
15 %). Time: a randomly initialised model of SmolLM2-135M's shape, documents of 512 tokens in random order, each asked
for before; time to the first token of a blend against prefix reuse of the same prompt (goal: half) and no cache, in
one interleaved run. What bounds it: the tokens that are not moved have to be computed, so the same model computing as
many after a cached prefix is the floor.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from harness import interleave, table, write_results
from rich.progress import track
from shapes import DTYPES, SMOLLM2_135M, random_model, random_tokens

from stemcache import Engine, SamplingParams
from stemcache.engine.blend import SHARE, Blend
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, is_right, random_corpus
from stemcache.ragcache.alone import read_alone
from stemcache.ragcache.compose import compose

SHARES = (0.0, 0.05, 0.15, 0.3, 1.0)
ANSWER = SamplingParams(max_tokens=48, temperature=0)
ONE = SamplingParams(max_tokens=1, temperature=0)
AT_ONCE = 50


def answers(count: int, sweep: int, documents: int, seed: int = 1) -> list[dict[str, Any]]:
    """Exact match with full computation and at each share, on the same prompts; other shares than the default on the
    first `sweep` of them."""
    rng = random.Random(seed)
    corpus = random_corpus(rng, 500)
    with Engine.load(MODEL_PATH) as engine:
        asked = []
        for _ in range(count):
            chosen = rng.sample(corpus, documents)
            fact = rng.choice(rng.choice(chosen).facts)
            system, user = {"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": fact.question}
            context = compose(engine.prompts, [system, user], [each.as_template_document() for each in chosen])
            asked.append((fact, context))
        full = [is_right(fact, text) for fact, text, _ in _texts(engine, asked, None)]
        rows = [{"share": None, "right": sum(full), "questions": count, "moved": 0.0, "lost": 0, "gained": 0}]
        for share in SHARES:
            n = count if share == SHARE else min(sweep, count)
            found = list(_texts(engine, asked[:n], share))
            right = [is_right(fact, text) for fact, text, _ in found]
            rows.append(
                {
                    "share": share,
                    "right": sum(right),
                    "questions": n,
                    "moved": sum(moved for *_, moved in found) / sum(len(context.tokens) for _, context in asked[:n]),
                    "lost": sum(a and not b for a, b in zip(full[:n], right, strict=True)),
                    "gained": sum(b and not a for a, b in zip(full[:n], right, strict=True)),
                }
            )
    return rows


def _texts(engine: Engine, asked: list[Any], share: float | None) -> Any:
    """(fact, answer, moved tokens) of every question. Each run has a tenant of its own, and so a cache of its own."""
    tenant = repr(share).encode()
    for begin in track(range(0, len(asked), AT_ONCE), description="computed" if share is None else f"{share:.0%}"):
        group = asked[begin : begin + AT_ONCE]
        blends = [None if share is None else Blend(c.spans[0][0], c.spans, share) for _, c in group]
        read_alone(engine, [(c.tokens, b) for (_, c), b in zip(group, blends, strict=True) if b], tenant, b"")
        streams = [
            engine.submit(context.tokens, ANSWER, tenant=tenant, blend=blend)
            for (_, context), blend in zip(group, blends, strict=True)
        ]
        for (fact, _), stream in zip(group, streams, strict=True):
            yield fact, "".join(delta.text for delta in stream), stream.usage.moved_tokens


def times(dtype: str, documents: int, length: int, repeats: int) -> dict[str, Any]:
    """Seconds to the first token of prompts with `documents` of twelve documents in random order."""
    rng = random.Random(0)
    head, corpus = random_tokens(rng, 64), [random_tokens(rng, length) for _ in range(12)]
    model = random_model(dtype)
    with Engine.from_model(model, pool_bytes=3 << 30) as engine:
        shares = (0.0, SHARE, 0.3)

        def prompt() -> tuple[list[int], tuple[tuple[int, int], ...]]:
            tokens, passages = list(head), []
            for each in rng.sample(corpus, documents):
                passages.append((len(tokens), len(tokens) + length))
                tokens += each + random_tokens(rng, 2)
            return tokens + random_tokens(rng, 32), tuple(passages)

        everything = head + [token for each in corpus for token in each]
        spans = tuple((len(head) + i * length, len(head) + (i + 1) * length) for i in range(len(corpus)))
        for tenant in (b"", b"prefix"):
            read_alone(engine, [(everything, Blend(len(head), spans))], tenant, b"")
        computed: dict[str, list[int]] = {}

        def run(name: str, share: float | None, tenant: bytes) -> None:
            tokens, passages = prompt()
            blend = None if share is None else Blend(len(head), passages, share)
            with engine.submit(tokens, ONE, tenant=tenant, blend=blend) as stream:
                list(stream)
            usage = stream.usage
            computed.setdefault(name, []).append(len(tokens) - usage.cached_tokens - usage.moved_tokens)

        def floor() -> None:
            """As many tokens as a blend of 15 % computes, after a prefix as long as the rest."""
            rows = documents * 2 + 32 + (documents - 1) * -(-length * 15 // 100)
            prefix = everything[: len(head) + documents * length - rows + 32]
            with engine.submit(prefix + random_tokens(rng, rows), ONE, tenant=b"floor") as stream:
                list(stream)
            assert stream.usage.cached_tokens >= len(prefix) - 1

        with engine.submit(everything[: documents * length], SamplingParams(max_tokens=0), tenant=b"floor") as stream:
            list(stream)
        functions = {f"blend {share:.0%}": (lambda s=share: run(f"blend {s:.0%}", s, b"")) for share in shares}
        functions["prefix reuse"] = lambda: run("prefix reuse", None, b"prefix")
        functions["no cache"] = lambda: (engine.cache.clear(tenant=b"none"), run("no cache", None, b"none"))
        functions["as many tokens after a prefix"] = floor
        timings = interleave(functions, repeats=repeats, warmup=1)
        engine.check()
    return {
        "dtype": dtype,
        "documents": documents,
        "document_tokens": length,
        "seconds": {name: [t.low, t.median, t.high] for name, t in timings.items()},
        "computed_tokens": {name: sum(counts) / len(counts) for name, counts in computed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--sweep", type=int, default=300, help="questions for shares other than the default")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--k", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.questions:
        show_answers(answers(options.questions, options.sweep, options.documents), options.documents)
    timed = []
    for dtype in options.dtypes:
        for k in options.k:
            timed.append(times(dtype, k, options.length, options.repeats))
            show_times(timed[-1])
            write_results("blend_times", {"model": SMOLLM2_135M, "times": timed})


def show_answers(found: list[dict[str, Any]], documents: int) -> None:
    rows = [
        ["no moves" if each["share"] is None else f"{each['share']:.0%}", each["questions"], f"{each['moved']:.0%}",
         f"{each['right'] / each['questions']:.1%}", each["lost"], each["gained"]]
        for each in found
    ]  # fmt: skip
    print(table(["computed again", "questions", "of the prompts moved", "exact match", "lost", "gained"], rows))
    write_results("blend_answers", {"model": MODEL_PATH.name, "documents": documents, "answers": found})


def show_times(timed: dict[str, Any]) -> None:
    reuse, computed = timed["seconds"]["prefix reuse"][1], timed["computed_tokens"]
    print(f"\n{timed['dtype']}, {timed['documents']} documents of {timed['document_tokens']} tokens")
    rows = [
        [name, *(f"{1000 * s:.0f}" for s in seconds), f"{reuse / seconds[1]:.2f}",
         f"{computed[name]:.0f}" if name in computed else ""]
        for name, seconds in timed["seconds"].items()
    ]  # fmt: skip
    print(
        table(["milliseconds", "low", "median", "high", "times faster than prefix reuse", "computed"], rows), flush=True
    )


if __name__ == "__main__":
    main()
