"""What a model answers: exact match on held-out questions over documents in the context.

    python benchmarks/answers.py                      the demo model, 1 to 12 documents
    python benchmarks/answers.py --model FOLDER --documents 8 --questions 1000

Names are held out of the demo model's training and facts are random, so a right answer was read. Later features that
trade answers for speed (quantised codecs, position-independent reuse) are measured by calling `exact_match` with and
without them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

from harness import table, write_results
from rich.progress import track

from stemcache import Engine, SamplingParams
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, Fact, is_right, random_corpus

QUESTIONS_PER_CONTEXT = 5


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches, and a few of the answers that were not."""

    right: int
    questions: int
    prompt_tokens: int
    cached_tokens: int
    wrong: tuple[tuple[str, str], ...]

    @property
    def exact_match(self) -> float:
        return self.right / self.questions


def questions(rng: random.Random, documents: int, count: int) -> Iterator[list[tuple[Fact, dict[str, object]]]]:
    """Contexts of `documents` documents, each with a few questions: the fact and the arguments of `encode_chat`."""
    for _ in range(-(-count // QUESTIONS_PER_CONTEXT)):
        corpus = random_corpus(rng, documents)
        asked = [rng.choice(rng.choice(corpus).facts) for _ in range(QUESTIONS_PER_CONTEXT)]
        texts = [document.as_template_document() for document in corpus]
        system = {"role": "system", "content": SYSTEM_PROMPT}
        yield [
            (fact, {"messages": [system, {"role": "user", "content": fact.question}], "documents": texts})
            for fact in asked
        ]


def exact_match(engine: Engine, *, documents: int, count: int, seed: int = 1) -> Score:
    """Ask `count` held-out questions over `documents` documents each, greedily."""
    right = asked = prompt_tokens = cached_tokens = 0
    wrong: list[tuple[str, str]] = []
    params = SamplingParams(max_tokens=48, temperature=0)
    contexts = list(questions(random.Random(seed), documents, count))
    for context in track(contexts, description=f"{documents:2d} documents"):
        prompts = [engine.encode_chat(**chat) for _, chat in context]  # type: ignore[arg-type]
        for (fact, _), completion in zip(context, engine.generate(prompts, params), strict=True):
            asked += 1
            right += is_right(fact, completion.text)
            prompt_tokens += completion.usage.prompt_tokens
            cached_tokens += completion.usage.cached_tokens
            if not is_right(fact, completion.text):
                wrong.append((fact.sentence, completion.text))
    return Score(right, asked, prompt_tokens, cached_tokens, tuple(wrong[:5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL_PATH)
    parser.add_argument("--documents", type=int, nargs="*", default=[1, 2, 4, 8, 12])
    parser.add_argument("--questions", type=int, default=1000)
    options = parser.parse_args()
    rows, results = [], []
    with Engine.load(options.model) as engine:
        for documents in options.documents:
            score = exact_match(engine, documents=documents, count=options.questions)
            tokens = score.prompt_tokens // score.questions
            hit_rate = score.cached_tokens / score.prompt_tokens
            rows.append([documents, score.questions, tokens, f"{score.exact_match:.1%}", f"{hit_rate:.0%}"])
            results.append({"documents": documents, "questions": score.questions, "exact_match": score.exact_match})
            for expected, got in score.wrong[:2]:
                print(f"  expected {expected!r}, got {got!r}")
    print(table(["documents", "questions", "prompt tokens", "exact match", "from the cache"], rows))
    write_results("answers", {"model": str(engine.model_name), "results": results})


if __name__ == "__main__":
    main()
