"""For the tests of the live page: a real server on the demo model, and a real Chromium that looks at it.

`make test-page` installs what they need. $STEMCACHE_CHROMIUM names another browser than Debian's.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo.facts import FactDocument, random_corpus

KEY = "alice-" + "a" * 32
# Without the middle ones Chromium looks for hosts of its maker's at each start.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
expect.set_options(timeout=60_000)  # milliseconds; the machine may be busy, and no test is about times
OPTIONS = ("--dtype", "float32", "--pool-bytes", "16MiB", "--chunk-tokens", "16")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("STEMCACHE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert path is not None, "no Chromium here: apt-get install chromium, or set STEMCACHE_CHROMIUM"
    with sync_playwright() as browsers:
        running = browsers.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With a disk tier, which shows text."""
    cold = ("--cold", f"disk://{tmp_path_factory.mktemp('cold')}", "--cold-bytes", "64MiB")
    with ServerProcess(*OPTIONS, *cold, "--show-cache-text") as process:
        process.wait_until_ready(timeout=600)
        yield process


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[ServerProcess]:
    """With a pool that holds a few documents, of which the least recently used goes, and a disk tier."""
    small = ("--dtype", "float32", "--pool-bytes", "512KiB", "--chunk-tokens", "16", "--eviction", "lru")
    with ServerProcess(*small, "--cold", f"disk://{tmp_path}/cold", "--cold-bytes", "64MiB") as process:
        process.wait_until_ready(timeout=600)
        yield process


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """With API keys, which shows no text."""
    keys: Path = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice {KEY}\nbob {'bob-' + 'b' * 32}\n")
    keys.chmod(0o600)
    with ServerProcess(*OPTIONS, "--api-keys", str(keys)) as process:
        process.wait_until_ready(timeout=600)
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of an empty cache without documents."""
    with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as made:
        names = [each["id"] for each in made.get("/v1/documents").json()["data"]]
        if names:
            made.delete("/v1/documents", params={"id": names}).raise_for_status()
        made.post("/v1/cache/clear").raise_for_status()
        yield made


@pytest.fixture
def corpus(request: pytest.FixtureRequest) -> list[FactDocument]:
    """Documents that no other test uses."""
    return random_corpus(random.Random(request.node.nodeid), 6)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages. At the end: no errors on the console, and nothing was asked of any other host."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []
    strangers: list[str] = []
    provoked: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(each in message.text for each in provoked):
            complaints.append(message.text)

    def watch(url: str, request: Request) -> None:
        if not request.url.startswith(f"{url}/"):
            strangers.append(request.url)

    def open_page(
        url: str, *, width: int = 1240, height: int = 900, failing: tuple[str, ...] = (), **options: Any
    ) -> Page:
        """failing: what Chromium may complain of, because the test makes it happen."""
        provoked.extend(failing)
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: watch(url, request))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert strangers == []


@pytest.fixture
def api_key() -> str:
    return KEY
