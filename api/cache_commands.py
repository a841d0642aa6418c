"""`stemcache explain` and `stemcache tree`: what a running server has cached, and why a prompt hits or misses.

Invariant: what is printed came from the server. Text from the cache is shown as text: neither markup nor control
characters in it have an effect on the terminal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from stemcache.api.cache_client import ask_cache
from stemcache.prefixtree.errors import StemcacheError

_STYLES: Final = {
    "hit": "green",
    "partial_chunk": "green",
    "public": "green",
    "pending": "cyan",
    "evicted": "red",
    "other_position": "magenta",
    "other_namespace": "magenta",
    "never_seen": "yellow",
}


class PromptFileError(StemcacheError):
    """The prompt file is not what the command takes."""


def explain(options: argparse.Namespace) -> int:
    """Print why the prompt in a file would hit or miss. Raises StemcacheError, OSError."""
    body = _prompt(_read(options.prompt_file), chat=options.chat)
    report = ask_cache(options.url, "POST", "explain", json=body)
    console = Console(highlight=False)
    prompt, cached = report["prompt_tokens"], report["cached_tokens"]
    console.print(f"{cached} of {prompt} prompt tokens are cached ({cached / prompt:.0%})\n")
    console.print(_ranges(report))
    if report["divergence"] is not None:
        console.print()
        console.print(_divergence(report["divergence"]))
    console.print()
    for sentence in report["advice"]:
        console.print(Padding(Text(_plain(sentence)), (0, 0, 0, 2)))
    return 0


def tree(options: argparse.Namespace) -> int:
    """Print the caller's prefix tree. Raises StemcacheError."""
    query = {"max_nodes": options.max_nodes, "text": options.text}
    answer = ask_cache(options.url, "GET", "tree", params=query)
    shown = "" if answer["shown_tokens"] == answer["cached_tokens"] else f", {answer['shown_tokens']} shown"
    below = f"; {answer['below_tokens']} more only in a tier below" if answer["below_tokens"] else ""
    drawn = Tree(Text(f"{answer['cached_tokens']} tokens cached{shown}, in chunks of {answer['chunk_tokens']}{below}"))
    at: dict[str | None, Tree] = {None: drawn}
    for node in answer["nodes"]:
        at[node["id"]] = at[node["parent"]].add(_label(node))
    for node in ({"id": None} | answer, *answer["nodes"]):
        if node["hidden_children"]:
            at[node["id"]].add(Text(f"… {node['hidden_children']} more", style="dim"))
    Console(highlight=False).print(drawn)
    return 0


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{name} is no UTF-8 text: {error.reason} at byte {error.start}") from None


def _prompt(text: str, *, chat: bool) -> dict[str, Any]:
    """The body of the request. A chat is JSON, a request's body or its messages alone; other text is one message."""
    if not chat:
        return {"prompt": text}
    if not text.lstrip().startswith(("{", "[")):
        return {"messages": [{"role": "user", "content": text}]}
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise PromptFileError(f"the chat begins like JSON and is none: {error}") from None
    return parsed if isinstance(parsed, dict) else {"messages": parsed}


def _ranges(report: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("begins with", overflow="ellipsis", no_wrap=True)
    for each in report["ranges"]:
        style = _STYLES.get(each["reason"], "dim")
        span = f"{each['start']} to {each['stop'] - 1}" if each["tokens"] > 1 else str(each["start"])
        cells = (span, each["result"], each["reason"].replace("_", " "))
        table.add_row(*(Text(cell, style=style) for cell in cells), Text(_plain(each["text"])))
    return table


def _divergence(divergence: Mapping[str, Any]) -> Table:
    """Both texts, one under the other."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    before = Text(_plain(divergence["before"]), style="dim")
    for name, style in (("prompt", "bold yellow"), ("cached", "bold green")):
        words = Text(_plain(divergence[name]), style=style)
        table.add_row(f"{name} at token {divergence['token']}", Text.assemble(before, words))
    return table


def _label(node: Mapping[str, Any]) -> Text:
    sharers, is_below = node["sharers"], node["tier"] == "below"
    label = Text(f"{node['tokens']} tokens", style="bold green" if sharers else "cyan" if is_below else "bold")
    use = f"{sharers} sharer{'s' if sharers > 1 else ''}" if sharers else f"idle {node['idle_seconds']:.0f} s"
    label.append(f"  {use}", style="green" if sharers else "dim")
    if is_below:
        label.append("  only in a tier below, which may have lost it since", style="cyan")
    elif node["stored_tokens"] >= node["tokens"]:
        label.append("  also in a tier below", style="dim")
    if "text" in node:
        label.append(f"  {_plain(node['text'].strip()[:60])}", style="not bold")
    return label


def _plain(text: str) -> str:
    """`text` on one line, without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else "⏎" if char == "\n" else "�" for char in text)
