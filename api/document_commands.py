"""`stemcache documents add|list|delete`: the documents of a running server.

Invariant: what is printed came from the server. Files are sent one after another, so what was added before an error is
added, and adding the same files again changes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stemcache.api.cache_client import ask_server
from stemcache.prefixtree.errors import StemcacheError
from stemcache.ragcache.batches import batches

Json = dict[str, Any]


class DocumentFileError(StemcacheError):
    """A file is not what the command takes."""


def documents(options: argparse.Namespace) -> int:
    """Run one of the three. Raises StemcacheError, OSError."""
    match options.action:
        case "add":
            return _add(options)
        case "list":
            return _list(options)
        case _:
            return _delete(options)


def _add(options: argparse.Namespace) -> int:
    given = [each for name in options.files for each in _read(Path(name))]
    shared: Json = {"metadata": dict(options.metadata)} if options.metadata else {}
    if options.ttl is not None:
        shared["ttl_seconds"] = options.ttl
    for each in given:
        each["metadata"] = shared.get("metadata", {}) | each.get("metadata", {})
        each |= {name: value for name, value in shared.items() if name not in each}
    told: Counter[str] = Counter()
    columns = TextColumn("adding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("adding", total=len(given))
        for batch in batches(given):
            answer = ask_server(options.url, "POST", "documents", json={"documents": batch})
            told.update(each["status"] for each in answer["data"])
            progress.advance(bar, len(batch))
    print(", ".join(f"{told[status]} {status}" for status in ("created", "updated", "unchanged")))
    return 0


def _list(options: argparse.Namespace) -> int:
    table = Table(box=None, pad_edge=False)
    for title in ("id", "title", "version", "passages", "expires"):
        table.add_column(title, justify="right" if title in ("version", "passages") else "left", overflow="fold")
    after, more, total = "", True, 0
    while more:
        page = ask_server(options.url, "GET", "documents", params={"after": after, "limit": 1000})
        more, total = page["has_more"], page["total"]
        for each in page["data"]:
            after = each["id"]
            expires = "" if each["expires_at"] is None else f"{each['expires_at']:.0f}"
            cells = (each["id"], each["title"], str(each["version"]), str(each["passages"]), expires)
            table.add_row(*(Text(_plain(cell)) for cell in cells))
    console = Console(highlight=False)
    if total:
        console.print(table)
    console.print(f"{total} document{'' if total == 1 else 's'}")
    return 0


def _delete(options: argparse.Namespace) -> int:
    for name in options.ids:
        answer = ask_server(options.url, "DELETE", f"documents/{quote(name, safe='/')}")
        print(f"{_plain(name)}: deleted, with {answer['forgotten_chunks']} cached chunks")
    return 0


def _read(path: Path) -> Iterator[Json]:
    """The documents of a file: of each line where it is JSONL, else one whose id is the file's path."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DocumentFileError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}") from None
    if path.suffix != ".jsonl":
        if not text.strip():
            raise DocumentFileError(f"{path} is empty")
        yield {"id": path.as_posix().lstrip("/."), "title": path.stem, "text": text}
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DocumentFileError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            raise DocumentFileError(f'{path}, line {number}: write {{"text": ...}}; id, title and metadata as you like')
        yield fields


def _plain(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else "�" for char in text)
