"""`stemcache demo`: questions over shared documents, asked of a real server over HTTP, several at a time.

Invariant: everything shown is measured at the client, on answers that the server gave; the server ends with the demo.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
from collections.abc import Iterator, Sequence

import httpx
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from stemcache.api.ask import Answer, Question, ask
from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo.facts import FactDocument, random_corpus

DOCUMENTS = 12
QUESTIONS = 40
SHELF = 4
FILLERS = 3
AT_A_TIME = 4
SEED = 7
RIGHT_AT_LEAST = 0.95


def demo() -> int:
    """Run it; 0 if at least 95 % of the answers are right, else 1. Raises ServerStartError."""
    console = Console(highlight=False)
    with ServerProcess() as server:
        with console.status("starting the server on the demo model ..."):
            server.wait_until_ready()
        console.print(
            f"Server at {server.url}/v1. {QUESTIONS} questions over {DOCUMENTS} documents, {AT_A_TIME} at a time."
        )
        answers = asyncio.run(_ask_all(server.url, list(questions(random.Random(SEED))), console))
    _summarise(answers, console)
    return 0 if _share_right(answers) >= RIGHT_AT_LEAST else 1


def questions(rng: random.Random) -> Iterator[Question]:
    """Questions whose documents are as popular as Zipf's law says: the k-th is asked 1/k as often as the first.

    A question comes with eight documents: those of the shelf of the document that answers it, and of the next shelf.
    So a retriever finds the neighbours of what it looks for, and hands them over in the order of the catalogue.
    """
    corpus = random_corpus(rng, DOCUMENTS, fillers=FILLERS)
    popularity = [1 / rank for rank in range(1, DOCUMENTS + 1)]
    ranked = rng.sample(range(DOCUMENTS), DOCUMENTS)
    for position in rng.choices(ranked, popularity, k=QUESTIONS):
        yield Question(rng.choice(corpus[position].facts), _retrieve(corpus, position))


def _retrieve(corpus: Sequence[FactDocument], position: int) -> tuple[FactDocument, ...]:
    shelf, shelves = position // SHELF, DOCUMENTS // SHELF
    found = sorted({shelf, (shelf + 1) % shelves})
    return tuple(document for each in found for document in corpus[each * SHELF : (each + 1) * SHELF])


async def _ask_all(url: str, wanted: Sequence[Question], console: Console) -> list[Answer]:
    answers: list[Answer] = []
    free = asyncio.Semaphore(AT_A_TIME)
    # A table that grows beyond the screen cannot be redrawn, so only its end is live; the whole is printed at the end.
    visible = max(1, console.height - 8)

    async def ask_one(question: Question) -> None:
        async with free:
            answers.append(await ask(client, question))
        live.update(_table(answers[-visible:]))

    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        with Live(console=console, transient=True, refresh_per_second=8) as live:
            await asyncio.gather(*(ask_one(question) for question in wanted))
    console.print(_table(answers))
    return answers


def _table(answers: Sequence[Answer]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("question")  # on a narrow terminal the two texts wrap, and the numbers keep their width
    table.add_column("answer")
    for title in ("right", "prompt", "cached", "TTFT ms"):
        table.add_column(title, justify="right", no_wrap=True)
    for answer in answers:
        right = "[green]yes[/]" if answer.is_right else "[red]NO[/]"
        cells = (answer.question.fact.question, answer.text)
        numbers = (str(answer.prompt_tokens), str(answer.cached_tokens), f"{1000 * answer.ttft_seconds:.0f}")
        table.add_row(*(escape(cell) for cell in cells), right, *numbers)
    return table


def _share_right(answers: Sequence[Answer]) -> float:
    return sum(answer.is_right for answer in answers) / len(answers)


def _summarise(answers: Sequence[Answer], console: Console) -> None:
    prompt = sum(answer.prompt_tokens for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    warm = [answer.ttft_seconds for answer in answers if answer.is_warm]
    cold = [answer.ttft_seconds for answer in answers if not answer.is_warm]
    console.print(f"right answers  {_share_right(answers):.0%} of {len(answers)}")
    console.print(f"hit rate       {cached / prompt:.0%}: {cached} of {prompt} prompt tokens were read before")
    for name, times in (("cold TTFT", cold), ("warm TTFT", warm)):
        if times:
            console.print(f"{name}      {1000 * statistics.median(times):.0f} ms, median of {len(times)}")
    if warm and cold:
        console.print(f"warm is {statistics.median(cold) / statistics.median(warm):.1f} times faster")


if __name__ == "__main__":
    sys.exit(demo())
