"""The live page's files, as they are served. What the page does in a browser: tests/page."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from stemcache.api import live_page
from stemcache.api.keys import Keyring
from stemcache.api.live_page import PATHS
from stemcache.api.server import create_app
from stemcache.engine.engine import Engine

FOLDER = Path(live_page.__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def app(engine: Engine) -> FastAPI:
    return create_app(engine, keyring=Keyring({"alice-key-0123456789": "alice"}, b"secret"))


def get(app: FastAPI, path: str, method: str = "GET") -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
            return await client.request(method, path)

    return asyncio.run(send())


def test_all_files_are_served_without_a_key_and_bound_to_this_server(app: FastAPI) -> None:
    served = set()
    for path in PATHS:
        answer = get(app, path)
        assert answer.status_code == 200, path
        name = path.removeprefix("/page/").strip("/") or "index.html"
        assert answer.text == (FOLDER / name).read_text()
        assert answer.headers["content-type"].startswith(TYPES[Path(name).suffix])
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"https?:|\*", policy)
        served.add(name)
    assert served == {file.name for file in FOLDER.iterdir()}
    assert get(app, "/", "HEAD").status_code == 200
    assert get(app, "/", "POST").status_code == 405


def test_what_the_page_is_made_of_needs_no_other_host_and_no_markup_from_data() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.", text), file.name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=|<style|style=", text), (
            file.name
        )


def test_the_page_says_nothing_of_what_is_cached(app: FastAPI) -> None:
    assert get(app, "/v1/cache/stats").status_code == 401
    assert get(app, "/page/../settings.py").status_code in (401, 404)
    assert get(app, "/page/other.js").status_code == 401
