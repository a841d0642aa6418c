"""Tool calls in OpenAI's shapes: the message of a whole answer, and the deltas of a stream.

Invariant: the deltas of a choice, put together, are its message.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterator
from typing import Any

from stemcache.api.tool_parser import Arguments, CallBegins, Content, ToolCallParser

Json = dict[str, Any]

_LETTERS = string.ascii_letters + string.digits


def _new_id() -> str:
    """Nine letters and digits: Mistral's templates refuse every other form when the call is given back."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


class ToolCallWriter:
    """Writes one choice. Without a parser everything is content."""

    def __init__(self, parser: ToolCallParser | None) -> None:
        self._parser = parser
        self._calls = 0

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's reason for an answer that ended with calls; one that was cut says so."""
        return "tool_calls" if self._calls and reason == "stop" else reason

    def parts(self, text: str, *, final: bool) -> Iterator[Json]:
        """The deltas that tell the next part of the text."""
        if self._parser is None:
            if text:
                yield {"content": text}
            return
        for event in self._parser.feed(text) + (self._parser.finish() if final else []):
            match event:
                case Content():
                    yield {"content": event.text}
                case CallBegins():
                    function = {"name": event.name, "arguments": ""}
                    call = {"index": self._calls, "id": _new_id(), "type": "function", "function": function}
                    self._calls += 1
                    yield {"tool_calls": [call]}
                case Arguments():
                    yield {"tool_calls": [{"index": self._calls - 1, "function": {"arguments": event.text}}]}

    def message(self, text: str) -> Json:
        """`content`, which is null where there are calls only, and `tool_calls`, where there are any."""
        content: list[str] = []
        calls: list[Json] = []
        for part in self.parts(text, final=True):
            content.append(part.get("content", ""))
            for delta in part.get("tool_calls", ()):
                if "id" in delta:
                    calls.append({name: value for name, value in delta.items() if name != "index"})
                else:
                    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
        joined = "".join(content)
        return {"content": joined or None, "tool_calls": calls} if calls else {"content": joined}
