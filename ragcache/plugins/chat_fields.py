"""What a chat request has beyond OpenAI's fields: `documents` and `rag`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def extra_body(
    given: Mapping[str, Any] | None, documents: Sequence[Any] | None, rag: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`extra_body` as the openai package takes it: what the caller gave, with documents and retrieval's options.

    documents: texts, or each with `title` and `text`. rag: as in docs/documents.md.
    """
    ours = {"documents": None if documents is None else list(documents), "rag": None if rag is None else dict(rag)}
    return {**(given or {}), **{name: value for name, value in ours.items() if value is not None}}


def template_document(title: object, text: str) -> dict[str, str]:
    """A document as chat templates take it. A title that is no text is none."""
    return {"title": title if isinstance(title, str) else "", "text": text}
