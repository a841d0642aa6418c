"""The request bodies and queries of the document routes, and `rag` of chat completions.

Invariant: what a document may be is `ragcache.documents`' business; here stands the form only.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from stemcache.api.request_model import RequestModel, with_examples
from stemcache.api.texts import Text

MAX_DOCUMENTS_AT_ONCE: Final = 1000
_YEAR = 365 * 24 * 3600.0

Value = Text | int | float | bool
Filter = Annotated[
    dict[str, Value | list[Value]], Field(description="Metadata that documents must have: a value, or one of a list.")
]


class DocumentFields(RequestModel):
    """PUT /v1/documents/{id}."""

    model_config = with_examples({"title": "The tower Velmora", "text": "The code of Velmora is 7392."})

    text: Text
    title: Text = ""
    metadata: dict[str, JsonValue] = Field(
        default_factory=dict, description="Retrieval can filter by its texts, numbers and booleans."
    )
    ttl_seconds: Annotated[float, Field(gt=0, le=_YEAR, allow_inf_nan=False)] | None = Field(
        default=None, description="When the document is deleted by itself; by default never."
    )
    pinned: bool = Field(default=False, description="Read it now, and keep its keys and values from eviction.")
    system_prompt: Text | None = Field(
        default=None, description="What the chats say before the documents, of one that is pinned."
    )


class NewDocument(DocumentFields):
    id: Text = Field(default="", description="Made from the content if it is left out.")


class AddDocuments(RequestModel):
    """POST /v1/documents."""

    model_config = with_examples(
        {"documents": [{"id": "velmora", "title": "The tower Velmora", "text": "The code of Velmora is 7392."}]}
    )

    documents: list[NewDocument] = Field(min_length=1, max_length=MAX_DOCUMENTS_AT_ONCE)


class ListQuery(BaseModel):
    """The query of GET /v1/documents."""

    model_config = ConfigDict(extra="forbid")

    after: str = Field(default="", max_length=256, description="The last id of the page before.")
    limit: int = Field(default=100, ge=1, le=1000)
    text: bool = Field(default=False, description="With their texts.")


class DeleteQuery(BaseModel):
    """The query of DELETE /v1/documents."""

    model_config = ConfigDict(extra="forbid")

    id: list[str] = Field(min_length=1, max_length=MAX_DOCUMENTS_AT_ONCE)


class SearchDocuments(RequestModel):
    """POST /v1/search."""

    model_config = with_examples({"query": "What is the code of Velmora?", "k": 2})

    query: Text
    k: int = Field(default=4, description="Passages at most.")
    filter: Filter | None = None


class RagOptions(RequestModel):
    """`rag` of a chat completion: retrieve documents for it on the server, or say how given ones are to be used."""

    k: int = Field(default=4, description="Passages at most.")
    query: Text | None = Field(default=None, description="What to look for; by default the last user message.")
    filter: Filter | None = None
    order: Literal["relevance", "cache"] = "relevance"
    max_shift: int | None = Field(default=None, description="Places that 'cache' may move a passage at most.")
    reuse: Text = Field(default="prefix", description="'prefix', which is exact, or 'blend' on a server with --blend.")
    explain: bool = Field(default=False, description="Say in full why something was computed; costs a little time.")
