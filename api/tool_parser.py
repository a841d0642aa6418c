"""Reading tool calls out of text that is still being generated.

Invariant: the result does not depend on how the text is cut into pieces. What is no call stays content, to the
character; only white space before, between and after calls is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from stemcache.api.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is not part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of a function that was offered; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next part of the arguments of the call that began last."""

    text: str


Event = Content | CallBegins | Arguments


class Phrase:
    """Words with white space between them, matched at the start of a text that may still grow.

    A word is a list of regular expressions, each for one character or, as the last of its kind, for a run of them.
    """

    def __init__(self, *words: str | list[str]) -> None:
        parts = [
            part
            for word in words
            for part in (r"\s*", *(word if isinstance(word, list) else [re.escape(char) for char in word]))
        ]
        self._whole = re.compile("".join(parts))
        started = ""
        for part in reversed(parts):
            started = f"(?:{part}{started})?"
        self._started = re.compile(started)

    def match(self, text: str) -> re.Match[str] | None:
        """The phrase at the start of the text."""
        return self._whole.match(text)

    def may_follow(self, text: str) -> bool:
        """Whether the whole text is the beginning of the phrase."""
        return self._started.fullmatch(text) is not None


class ToolCallParser:
    """Reads one choice."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._marker = form.marker
        self._names = names
        name = ['"', r"([\w.-]*)", '"']
        head = ("{", '"name"', ":", name, ",", f'"{form.arguments}"', ":", [r"(?=\{)"])
        self._first_head = Phrase(*(["["] if form.is_list else []), *head)
        self._next_head = Phrase(",", *head)
        self._end = Phrase("}", *([form.closing] if form.closing and not form.is_list else []))
        self._is_list = self._in_list = form.is_list
        self._text = ""
        self._head_text = ""  # what the content has to get back if this is no call after all
        self._head = self._first_head
        self._depth = 0
        self._in_string = self._escaped = False
        self._state = self._read_content if self._marker else self._read_head

    def feed(self, text: str) -> list[Event]:
        """What `text`, the next part, makes certain."""
        self._text += text
        return list(self._read(final=False))

    def finish(self) -> list[Event]:
        """What is left when there is no more text."""
        return list(self._read(final=True))

    def _read(self, *, final: bool) -> Iterator[Event]:
        while True:
            state, length = self._state, len(self._text)
            yield from state(final)
            if self._state == state and len(self._text) == length:
                return

    # Each state takes what it can from the start of the text, and says who goes on.

    def _read_content(self, final: bool) -> list[Event]:
        at = self._text.find(self._marker) if self._marker else -1
        if at < 0:
            return _content(self._take(len(self._text) - (0 if final else self._held())))
        content = self._text[:at].rstrip()
        self._take(len(content))
        self._head_text = self._take(at - len(content) + len(self._marker))
        self._head, self._state, self._in_list = self._first_head, self._read_head, self._is_list
        return _content(content)

    def _read_head(self, final: bool) -> list[Event]:
        match = self._head.match(self._text)
        if match is not None and match[1] in self._names:
            self._take(match.end())
            self._depth, self._in_string, self._escaped, self._state = 0, False, False, self._read_arguments
            return [CallBegins(match[1])]
        if final or match is not None or not self._head.may_follow(self._text):
            self._state = self._read_content
            return _content(self._head_text)
        return []

    def _read_arguments(self, final: bool) -> list[Event]:
        for position, char in enumerate(self._text, start=1):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._state = self._read_end
                    return [Arguments(self._take(position))]
        return [Arguments(self._take(len(self._text)))] if self._text else []

    def _read_end(self, final: bool) -> list[Event]:
        match = self._end.match(self._text)
        if match is not None:
            self._take(match.end())
        elif final or not self._end.may_follow(self._text):  # what closes the call was forgotten, or half of it
            self._text = self._text.lstrip().removeprefix("}")
        else:
            return []
        self._state = self._read_between
        return []

    def _read_between(self, final: bool) -> list[Event]:
        """After a call: the next one of a list, the end of the list, or text."""
        self._text = self._text.lstrip()
        if self._in_list and self._text.startswith(","):
            self._head, self._head_text, self._state = self._next_head, "", self._read_head
        elif self._in_list and self._text.startswith("]"):
            self._take(1)
            self._in_list = False
        elif self._text:
            self._state = self._read_content
        return []

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _held(self) -> int:
        """How much of the end of the text may be white space before a marker, or a marker's beginning."""
        if not self._marker:
            return 0
        start = len(self._text)
        for length in range(min(len(self._marker) - 1, start), 0, -1):
            if self._marker.startswith(self._text[-length:]):
                start -= length
                break
        return len(self._text) - len(self._text[:start].rstrip())


def _content(text: str) -> list[Event]:
    return [Content(text)] if text else []
