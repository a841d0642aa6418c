"""The forms in which chat templates teach models to write tool calls.

Invariant: what a format's grammar allows, its parser reads as calls; and a call is written as the template writes it
into a later prompt, white space in the arguments apart, so that a conversation goes on from the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stemcache.engine.grammar import schema_text

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called, and the schema that its arguments follow."""

    name: str
    arguments: Schema


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls as JSON objects, `{"name": ..., "arguments": {...}}`, and what stands around them.

    marker: what a call begins with, or the list of calls where `is_list`; a format without one is a call or text as a
        whole. arguments: the key of the arguments. before, after: what stands around a call, or the list.
    """

    name: str
    marker: str = ""
    before: str = ""
    after: str = ""
    arguments: str = "arguments"
    is_list: bool = False

    def grammar(
        self,
        functions: Sequence[Function],
        literal: Callable[[str], str],
        *,
        required: bool,
        parallel: bool,
        answer: Schema | None = None,
    ) -> str:
        """A Lark grammar: calls of `functions`, or where none is `required` an answer instead.

        literal: writes a marker as Lark has to name it. answer: the schema of the answer, None for text.
        A format without a marker allows one call, as nothing would tell a second one from text.
        """
        marker = literal(self.marker) if self.marker else ""
        before, after = (json.dumps(text) if text else "" for text in (self.before, self.after))
        many = parallel and bool(self.marker)
        more_in_list = ' (", " call)*' if many and self.is_list else ""
        body = f"{before} call{more_in_list} {after}"
        more_calls = rf' ("\n" {marker} {body})*' if many and not self.is_list else ""
        rules = [f"calls: {marker} {body}{more_calls}", "call: " + _one_of("call", functions)]
        for i, function in enumerate(functions):
            head = json.dumps(f'{{"name": "{function.name}", "{self.arguments}": ')
            rules += [f'call_{i}: {head} args_{i} "}}"', f"args_{i}: %json {schema_text(function.arguments, 'tools')}"]
        if required:
            return "\n".join(["start: calls", *rules])
        if answer is not None:
            return "\n".join(["start: calls | answer", f"answer: %json {schema_text(answer, 'tools')}", *rules])
        if not marker:
            return "\n".join(["start: calls | TEXT", r"TEXT: /([^\s{](.|\n)*)?/", *rules])
        rules += [f"text_call: text_marker {body}", r"TEXT: /(.|\n)*/"]
        # A special token is no part of a text; a marker that is text ends the text before it where it is first found.
        rules.append(f"text_marker{'' if marker.startswith('<[') else '[lazy]'}: TEXT {marker}")
        return "\n".join(["start: text_call* TEXT" if more_calls else "start: text_call | TEXT", *rules])


def _one_of(rule: str, items: Sequence[object]) -> str:
    return " | ".join(f"{rule}_{i}" for i in range(len(items)))


HERMES: Final = ToolFormat("hermes", marker="<tool_call>", before="\n", after="\n</tool_call>")
MISTRAL: Final = ToolFormat("mistral", marker="[TOOL_CALLS]", before="[", after="]", is_list=True)
LLAMA: Final = ToolFormat("llama", arguments="parameters")
# For templates of no known form: what the model writes freely cannot be read then, but it can be made to write this.
PLAIN: Final = ToolFormat("plain")

_SIGNS: Final = (
    # The same words in templates whose calls look different: Qwen3-Coder's and GLM's XML, Mistral's later form.
    (re.compile(r"<function=|<arg_key>|\[ARGS\]|\[CALL_ID\]"), PLAIN),
    (re.compile(r"<tool_call>"), HERMES),
    (re.compile(r"\[TOOL_CALLS\]"), MISTRAL),
    (re.compile(r"\{\\?\"name\\?\": function name, \\?\"parameters\\?\":"), LLAMA),
)


def detect(template: str) -> ToolFormat:
    """The format that a chat template teaches; PLAIN when it is none that is known."""
    return next((form for sign, form in _SIGNS if sign.search(template)), PLAIN)
