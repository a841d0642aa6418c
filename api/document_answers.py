"""The answers' shapes of the document routes, and `rag` of a chat completion, for the OpenAPI description.

Invariant: as in `answers`: the routes build plain dictionaries, and the tests hold the two against each other.
"""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from stemcache.api.answers import Answer


class DocumentEntry(Answer):
    id: str
    object: Literal["document"]
    title: str
    metadata: dict[str, JsonValue]
    version: int
    content_hash: str
    passages: int
    created_at: float
    updated_at: float
    expires_at: float | None
    pinned: bool
    system_prompt: str | None


class ChangedDocument(DocumentEntry):
    """PUT /v1/documents/{id}."""

    status: Literal["created", "updated", "unchanged"]
    forgotten_chunks: int


class DocumentAnswer(DocumentEntry):
    """GET /v1/documents/{id}."""

    text: str


class ChangedDocuments(Answer):
    """POST /v1/documents."""

    object: Literal["list"]
    data: list[ChangedDocument]


class DocumentList(Answer):
    """GET /v1/documents."""

    object: Literal["list"]
    data: list[DocumentEntry | DocumentAnswer]
    has_more: bool
    total: int


class FoundPassage(Answer):
    """A document, or a piece of a long one. `score`: the cosine of its and the query's vectors."""

    id: str
    object: Literal["document.passage"]
    passage: int
    version: int
    title: str
    text: str
    metadata: dict[str, JsonValue]
    score: float


class FoundPassages(Answer):
    """POST /v1/search. The best first; `notes` say why there are none."""

    object: Literal["list"]
    data: list[FoundPassage]
    notes: list[str]


class DeletedDocument(Answer):
    """DELETE /v1/documents/{id}."""

    id: str
    object: Literal["document"]
    deleted: bool
    forgotten_chunks: int


class DeletedDocuments(Answer):
    """DELETE /v1/documents."""

    object: Literal["list"]
    data: list[DeletedDocument]
