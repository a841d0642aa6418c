"""Take the pictures of the live page that docs/live-page.md shows: `python scripts/page_screenshots.py`.

A real server on the demo model, with documents, a pool that is too small for them, tiers below it, and questions that
keep coming while Chromium looks. Without motion, or a picture might show blocks on their way.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo.facts import SYSTEM_PROMPT, FactDocument, random_corpus

DOCS = Path(__file__).resolve().parents[1] / "docs"
CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SEED = 11
WATCHED_SECONDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=DOCS, help="the folder (default: docs/)")
    folder = parser.parse_args().to
    corpus = random_corpus(random.Random(SEED), 24, fillers=6)
    with tempfile.TemporaryDirectory() as place:
        tiers = ("--cold", f"disk://{place}/cold", "--cold-bytes", "64MiB", "--host-bytes", "8MiB")
        small = ("--pool-bytes", "3MiB", "--chunk-tokens", "16", "--show-cache-text")
        with ServerProcess(*small, *tiers) as server:
            server.wait_until_ready()
            with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client:
                add_documents(client, corpus)
                with questions(client, corpus), sync_playwright() as browsers:
                    browser = browsers.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
                    for view in VIEWS:
                        take(browser, server.url, view, corpus, folder)
                    browser.close()


@dataclass(frozen=True)
class View:
    """A picture. `focus`: the element at its top, after a question was asked through the page."""

    name: str
    width: int
    height: int
    scheme: Literal["light", "dark"]
    focus: str | None = None


VIEWS = (
    View("light", 1240, 800, "light"),
    View("dark", 1240, 1330, "dark", "#ask-title"),
    View("phone", 390, 844, "light"),
)


def take(browser: Browser, url: str, view: View, corpus: list[FactDocument], folder: Path) -> None:
    """Let the page watch for a while, and take its picture."""
    size: Any = {"width": view.width, "height": view.height}
    with browser.new_context(viewport=size, color_scheme=view.scheme, reduced_motion="reduce") as context:
        page = context.new_page()
        page.goto(url)
        page.wait_for_timeout(1000 * WATCHED_SECONDS)
        if view.focus is None:
            page.locator("#tree .box").nth(3).hover(force=True)
        else:
            ask(page, corpus)
            page.evaluate(f"scrollTo(0, document.querySelector('{view.focus}').closest('section').offsetTop - 16)")
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"live-page-{view.name}.png")


def add_documents(client: httpx.Client, corpus: list[FactDocument]) -> None:
    documents = [
        {"id": document.title.replace(" ", "-").lower(), "title": document.title, "text": document.text}
        for document in corpus
    ]
    client.post("/v1/documents", json={"documents": documents}).raise_for_status()


@contextmanager
def questions(client: httpx.Client, corpus: list[FactDocument]) -> Iterator[None]:
    """Questions about the corpus, by popularity, one after another, until the block is left."""
    over, rng = threading.Event(), random.Random(SEED)
    popularity = [1 / rank for rank in range(1, len(corpus) + 1)]

    def go_on() -> None:
        while not over.wait(rng.expovariate(2.5)):
            (document,) = rng.choices(corpus, popularity)
            client.post("/v1/chat/completions", json=chat(rng.choice(document.facts).question, rng.choice((2, 3, 4))))

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def chat(question: str, k: int) -> dict[str, object]:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    return {"messages": messages, "max_tokens": 16, "temperature": 0, "rag": {"k": k, "order": "cache"}}


def ask(page: Page, corpus: list[FactDocument]) -> None:
    """Ask through the page."""
    page.get_by_text("More", exact=True).click()
    page.get_by_label("System prompt").fill(SYSTEM_PROMPT)
    page.locator("#order").select_option("cache")
    page.get_by_text("More", exact=True).click()
    page.locator("#retrieve").check()
    page.locator("#question").fill(corpus[0].facts[0].question)
    page.get_by_role("button", name="Ask").click()
    page.locator("#answer-note").filter(has_text="reused").wait_for()


if __name__ == "__main__":
    main()
