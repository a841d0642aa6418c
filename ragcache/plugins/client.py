"""The documents of a server, over HTTP.

Invariant: an answer that is not the server's yes is a ServerAnswerError that says why. A client may be used from any
thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import quote

import httpx

from stemcache.ragcache.batches import batches
from stemcache.ragcache.errors import ServerAnswerError
from stemcache.ragcache.server_answer import answer_of, base_of, nobody

Json = dict[str, Any]
Filter = Mapping[str, Any]

DEFAULT_URL: Final = "http://127.0.0.1:8000/v1"
# The openai package wants a key; a server without keys looks at none.
NO_KEY: Final = "none"
_PAGE = 100


@dataclass(frozen=True, slots=True)
class FoundPassage:
    """A passage of a document, and the cosine of its and the query's vectors."""

    document_id: str
    position: int
    title: str
    text: str
    metadata: Mapping[str, Any]
    score: float

    @property
    def id(self) -> str:
        """The document's own for its first passage, so that a document that was not split keeps its id."""
        return f"{self.document_id}#{self.position}" if self.position else self.document_id

    @property
    def metadata_with_title(self) -> Json:
        """For frameworks whose documents have no title of their own."""
        return with_title(self.metadata, self.title)


class DocumentsClient:
    """The routes under /v1/documents, and /v1/search. Methods raise ServerAnswerError.

    base_url: of the server, as OpenAI clients take it. timeout: in seconds, of each request; texts that are added are
    embedded meanwhile.
    """

    def __init__(self, base_url: str = DEFAULT_URL, api_key: str | None = None, timeout: float = 120.0) -> None:
        headers = {} if not api_key or api_key == NO_KEY else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=f"{base_of(base_url)}/v1/", headers=headers, timeout=timeout)

    def close(self) -> None:
        """Idempotent."""
        self._http.close()

    def add(self, documents: Sequence[Json]) -> list[Json]:
        """Add documents, or change those with the same ids; returns each as the server has it, with its `status`.

        documents: as in docs/documents.md. After an error those before it are added.
        """
        return [
            each for batch in batches(documents) for each in self._ask("POST", "documents", documents=batch)["data"]
        ]

    def delete(self, document_id: str) -> bool:
        """Delete a document and all that was computed from it; False if there was none."""
        try:
            self._ask("DELETE", _path(document_id))
        except ServerAnswerError as error:
            if error.code == "document_not_found":
                return False
            raise
        return True

    def has(self, document_id: str) -> bool:
        """Whether there is such a document."""
        try:
            self._ask("GET", _path(document_id))
        except ServerAnswerError as error:
            if error.code == "document_not_found":
                return False
            raise
        return True

    def count(self) -> int:
        """How many documents there are."""
        return int(self._ask("GET", "documents?limit=1")["total"])

    def all(self) -> Iterator[Json]:
        """Every document with its text, in the order of their ids, a page at a time."""
        after, more = "", True
        while more:
            page = self._ask("GET", f"documents?text=true&limit={_PAGE}&after={quote(after)}")
            yield from page["data"]
            more = page["has_more"]
            after = page["data"][-1]["id"] if more else ""

    def search(self, query: str, k: int, where: Filter | None = None) -> list[FoundPassage]:
        """Up to `k` passages, the nearest first; none from a server without documents."""
        found = self._ask("POST", "search", query=query, k=k, filter=where and dict(where))["data"]
        names = ("passage", "title", "text", "metadata", "score")
        return [FoundPassage(each["id"], *(each[name] for name in names)) for each in found]

    def _ask(self, method: str, path: str, **body: Any) -> Json:
        try:
            response = self._http.request(method, path, json=body or None)
        except (TypeError, ValueError) as error:
            raise ServerAnswerError(f"the documents cannot be sent as JSON: {error}") from None
        except httpx.HTTPError as error:
            raise nobody(str(self._http.base_url), error) from error
        return answer_of(response)


@lru_cache(maxsize=32)
def client_of(base_url: str, api_key: str | None) -> DocumentsClient:
    """The client for a server and a key: one, so that its connections are kept.

    Frameworks copy and pickle their objects; these name their server, and so need not hold what cannot be copied.
    """
    return DocumentsClient(base_url, api_key)


def with_title(metadata: Mapping[str, Any], title: str) -> Json:
    """Metadata that says the title too."""
    return {**metadata, **({"title": title} if title else {})}


def without_title(metadata: Mapping[str, Any]) -> tuple[str, Json]:
    """The title that metadata say, and the rest. A title that is no text stays where it is."""
    title = metadata.get("title", "")
    if not isinstance(title, str):
        return "", dict(metadata)
    return title, {name: value for name, value in metadata.items() if name != "title"}


def _path(document_id: str) -> str:
    return f"documents/{quote(document_id, safe='/')}"
