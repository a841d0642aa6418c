"""Composing a prompt: the system prompt, then documents, then the question; what changes last stands last.

Invariant: the prompt is what the model's chat template makes of the same messages and documents; composing only finds
out in addition which tokens each document is. A document's span begins no later than the first token that depends on
its text. Where the template has no place for documents, they follow the system prompt.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from stemcache.engine.common_prefix import common_prefix
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.prompts import Prompts

Message = Mapping[str, Any]
Texts = Mapping[str, str]
Render = Callable[[Sequence[Texts]], str]

# Stands for a document in a second rendering. No text begins or ends with it, nor does a template trim it.
_OTHER = "\ue000"


@dataclass(frozen=True, slots=True)
class Template:
    """How messages become a prompt, besides the messages: what `Prompts.encode_chat` takes."""

    tools: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """A prompt's token ids and, for each document in order, its tokens [start, stop)."""

    tokens: list[int]
    spans: tuple[tuple[int, int], ...]

    @property
    def head(self) -> list[int]:
        """The tokens before the documents."""
        return self.tokens[: self.spans[0][0]] if self.spans else self.tokens


def compose(
    prompts: Prompts, messages: Sequence[Message], documents: Sequence[Texts], template: Template | None = None
) -> Context:
    """The prompt of a conversation with documents, each with `title` and `text`.

    A model without a chat template gets plain text.
    Raises InvalidRequestError as `Prompts.render_chat` does.
    """
    template = template or Template()
    if not prompts.has_chat_template:
        return _located(prompts, lambda these: _plain(messages, these), documents, add_special_tokens=True)
    if prompts.takes_documents or not documents:
        renderings: list[Render] = [lambda these: _render(prompts, messages, template, these or None)]
    else:  # a template may have no system role either, as Gemma 2's
        renderings = [
            lambda these: _render(prompts, _after_system(messages, these), template, None),
            lambda these: _render(prompts, _before_question(messages, these), template, None),
        ]
    special = template.add_special_tokens
    for render in renderings[:-1]:
        try:
            return _located(prompts, render, documents, add_special_tokens=special)
        except InvalidRequestError:
            continue
    return _located(prompts, renderings[-1], documents, add_special_tokens=special)


def _render(
    prompts: Prompts, messages: Sequence[Message], template: Template, documents: Sequence[Texts] | None
) -> str:
    return prompts.render_chat(
        messages,
        documents=documents,
        tools=template.tools,
        add_generation_prompt=template.add_generation_prompt,
        continue_final_message=template.continue_final_message,
        template_kwargs=template.template_kwargs,
    )


def _after_system(messages: Sequence[Message], documents: Sequence[Texts]) -> list[Message]:
    """The documents at the end of the system prompt."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": _joined(system, documents)}, *rest]


def _before_question(messages: Sequence[Message], documents: Sequence[Texts]) -> list[Message]:
    """The documents at the beginning of the first message."""
    first = dict(messages[0])
    return [first | {"content": f"{_joined('', documents)}\n\n{first['content']}"}, *messages[1:]]


def _plain(messages: Sequence[Message], documents: Sequence[Texts]) -> str:
    """For models without a chat template, which go on with a text."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    asked = "\n\n".join(f"Question: {message['content']}" for message in messages if message["role"] != "system")
    return f"{_joined(system, documents)}\n\n{asked}\nAnswer:"


def _joined(system: str, documents: Sequence[Texts]) -> str:
    texts = [f"{each['title']}\n{each['text']}" if each["title"] else each["text"] for each in documents]
    return "\n\n".join([system, *texts] if system else texts)


def _located(prompts: Prompts, render: Render, documents: Sequence[Texts], *, add_special_tokens: bool) -> Context:
    """The prompt, with each document found by rendering once more with another text in its place.

    Where the two renderings begin to differ, the document begins, whatever the template makes of it. Rejected: looking
    for the document's text, which templates trim and escape, and which may stand in the question too.
    """
    text = render(documents)
    tokens, offsets = prompts.encode_with_offsets(text, add_special_tokens=add_special_tokens)
    starts = list(accumulate((start for start, _ in offsets), max))
    stops = list(accumulate((stop for _, stop in offsets), max))
    spans = []
    for at, document in enumerate(documents):
        other = {"title": _OTHER if document["title"] else "", "text": _OTHER}
        altered = render([*documents[:at], other, *documents[at + 1 :]])
        first = common_prefix(text, altered)
        last = len(text) - common_prefix(text[first:][::-1], altered[first:][::-1])
        begin = min(bisect_right(stops, first), len(tokens) - 1)
        spans.append((begin, max(begin + 1, bisect_left(starts, last))))
    return Context(tokens, tuple(spans))
