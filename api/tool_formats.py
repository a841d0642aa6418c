"""The forms in which chat templates teach models to write tool calls.

Invariant: what a format's grammar allows, its parser reads as calls; and a call is written as the template writes it
into a later prompt, white space in the arguments apart, so that a conversation goes on from the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from stemcache.engine.grammar import schema_text

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Function:
    """A function that may be called, and the schema that its arguments follow."""

    name: str
    arguments: Schema


class TokenNames(Protocol):
    """How a Lark grammar has to name tokens; an engine's `grammars` knows."""

    def literal(self, text: str) -> str: ...
    def shown_tokens(self, *, but: str) -> str: ...


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls as JSON objects, `{"name": ..., "arguments": {...}}`, and what stands around them.

    marker: what a call begins with, or the list of calls where `is_list`; a format without one is a call or text as a
        whole. closing: what it ends with. before, after: what stands between them and the JSON.
    arguments: the key of the arguments.
    """

    name: str
    marker: str = ""
    before: str = ""
    after: str = ""
    closing: str = ""
    arguments: str = "arguments"
    is_list: bool = False

    def grammar(
        self,
        functions: Sequence[Function],
        tokens: TokenNames,
        *,
        required: bool,
        parallel: bool,
        answer: Schema | None = None,
    ) -> str:
        """A Lark grammar: calls of `functions`, or where none is `required` an answer or text instead.

        answer: the schema of the answer, None for text. A format without a marker allows one call, as nothing would
        tell a second one from text.
        """
        many = parallel and bool(self.marker)
        marker, closing = (tokens.literal(text) if text else "" for text in (self.marker, self.closing))
        before, after = (json.dumps(text) if text else "" for text in (self.before, self.after))
        more_in_list = ' (", " call)*' if many and self.is_list else ""
        body = f"{before} call{more_in_list} {after} {closing}"
        more_calls = rf' ("\n" {marker} {body})*' if many and not self.is_list else ""
        rules = [f"calls: {marker} {body}{more_calls}", "call: " + _one_of("call", functions)]
        for i, function in enumerate(functions):
            head = json.dumps(f'{{"name": "{function.name}", "{self.arguments}": ')
            rules += [f'call_{i}: {head} args_{i} "}}"', f"args_{i}: %json {schema_text(function.arguments, 'tools')}"]
        if required:
            return "\n".join(["start: calls", *rules])
        if answer is not None:
            return "\n".join(["start: calls | answer", f"answer: %json {schema_text(answer, 'tools')}", *rules])
        shown = tokens.shown_tokens(but=self.marker)
        rest = f"({shown} TEXT)*" if shown else ""
        rules.append(r"TEXT: /(.|\n)*/")
        if not marker:
            return "\n".join([f"start: calls | NO_CALL {rest}", r"NO_CALL: /([^\s{](.|\n)*)?/", *rules])
        rules.append(f"text_call: {f'(TEXT {shown})*' if shown else ''} text_marker {body}")
        # A token of its own is no part of a text; a marker that is text ends the text where it is first found.
        rules.append(f"text_marker{'' if marker.startswith('<[') else '[lazy]'}: TEXT {marker}")
        return "\n".join(
            [f"start: text_call* TEXT {rest}" if more_calls else f"start: text_call | TEXT {rest}", *rules]
        )


def _one_of(rule: str, items: Sequence[object]) -> str:
    return " | ".join(f"{rule}_{i}" for i in range(len(items)))


HERMES: Final = ToolFormat("hermes", marker="<tool_call>", before="\n", after="\n", closing="</tool_call>")
MISTRAL: Final = ToolFormat("mistral", marker="[TOOL_CALLS]", before="[", closing="]", is_list=True)
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
