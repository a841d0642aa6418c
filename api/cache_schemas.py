"""The request bodies of the cache routes.

Invariant: a prompt is given in the body of the completion or chat request that it belongs to, and read as that route
reads it, so what is explained, warmed or pinned is what the request will find. Sampling fields are checked and play no
part.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from stemcache.api.recent import MAX_RECENT
from stemcache.api.schemas import ChatRequest, CompletionRequest

MAX_NODES = 5000
_YEAR = 365 * 24 * 3600.0

TtlSeconds = Annotated[
    float | None,
    Field(gt=0, le=_YEAR, allow_inf_nan=False, description="When the pin ends by itself; by default never."),
]


class PinCompletionRequest(CompletionRequest):
    """POST /v1/cache/pin, for a completion's prompt."""

    ttl_seconds: TtlSeconds = None


class PinChatRequest(ChatRequest):
    """POST /v1/cache/pin, for a conversation."""

    ttl_seconds: TtlSeconds = None


def _kind(body: Any) -> str | None:
    if isinstance(body, dict):
        return "[chat]" if "messages" in body else "[completion]"
    return None


# With brackets, as pydantic's mark for a key: the names of the variants stay out of errors' parameter names.
Prompt = Annotated[
    Annotated[CompletionRequest, Tag("[completion]")] | Annotated[ChatRequest, Tag("[chat]")], Discriminator(_kind)
]
PinPrompt = Annotated[
    Annotated[PinCompletionRequest, Tag("[completion]")] | Annotated[PinChatRequest, Tag("[chat]")],
    Discriminator(_kind),
]


class CacheQuery(BaseModel):
    """The query of the routes that take no prompt."""

    model_config = ConfigDict(extra="forbid")

    cache_salt: str = Field(default="", max_length=1024, description="Of the requests that are meant; none by default.")


class TreeQuery(CacheQuery):
    """The query of GET /v1/cache/tree."""

    max_nodes: int = Field(default=500, ge=1, le=MAX_NODES, description="Chunks to walk and show at most.")
    depth: int | None = Field(default=None, ge=1, description="Chunks from the root to go down at most.")
    text: bool = Field(default=False, description="With the cached text, where the server allows it.")


class StatsQuery(CacheQuery):
    """The query of GET /v1/cache/stats."""

    documents: int = Field(default=100, ge=0, le=1000, description="Documents to tell of at most, the latest used.")


class RequestsQuery(CacheQuery):
    """The query of GET /v1/cache/requests."""

    limit: int = Field(default=100, ge=1, le=MAX_RECENT, description="Requests to tell of at most.")
