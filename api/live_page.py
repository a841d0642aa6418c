"""The live page at `/`: the prefix tree, hits and misses, times and memory, drawn in the browser from /v1/cache.

Invariant: the page's files hold no data, so they are served without a key; what it shows it asks for with the visitor's
own. It loads nothing from elsewhere, and the browser is told to let it do nothing else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, Response

_FOLDER: Final = Path(__file__).with_name("page")
_FILES: Final = {
    "/": "index.html",
    "/page/style.css": "style.css",
    "/page/icon.svg": "icon.svg",
    "/page/main.js": "main.js",
    "/page/client.js": "client.js",
    "/page/dom.js": "dom.js",
    "/page/tree.js": "tree.js",
    "/page/layout.js": "layout.js",
    "/page/figures.js": "figures.js",
    "/page/ask.js": "ask.js",
}

PATHS: Final = frozenset(_FILES)
"""What is served without a key."""

_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_live_page(app: FastAPI) -> None:
    """Serve the page and its files."""
    for path, name in _FILES.items():
        app.add_route(path, _serve(_FOLDER / name), include_in_schema=False)


def _serve(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        return FileResponse(file, headers=_HEADERS)

    return serve
