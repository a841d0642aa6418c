"""Documents: texts with an identity.

Invariant: a document that exists is valid, and its content hash changes if and only if its title or text does. A
document's passages are what is retrieved and put into prompts; together they are its text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from stemcache.ragcache.errors import DocumentError

Scalar = str | int | float | bool
Value = Scalar | Sequence[Any] | Mapping[str, Any] | None
Status = Literal["created", "updated", "unchanged"]

MAX_ID: Final = 256
MAX_METADATA: Final = 64
MAX_METADATA_VALUE: Final = 8192
MAX_METADATA_LEVELS: Final = 16  # SQLite reads JSON of up to 1,000


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What is added.

    id: unique for its owner; made from the content if it is empty, so that the same text is the same document.
    metadata: what JSON can hold; retrieval can filter by texts, numbers and booleans. expires_at: in seconds since
        1970; None for never.
    pinned: its keys and values, right after the system prompt, are kept from eviction.
    system_prompt: what it is pinned after; None for the context cache's own. Only of pinned documents.

    Raises DocumentError.
    """

    text: str
    id: str = ""
    title: str = ""
    metadata: Mapping[str, Value] = field(default_factory=dict)
    expires_at: float | None = None
    pinned: bool = False
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise DocumentError("the document's text is empty", param="text")
        if self.system_prompt is not None and not self.pinned:
            raise DocumentError("'system_prompt' is what a document is pinned after: pin it too", param="system_prompt")
        if not self.id:
            object.__setattr__(self, "id", f"doc-{self.content_hash[:24]}")
        _check_id(self.id)
        _check_metadata(self.metadata)

    @property
    def content_hash(self) -> str:
        """SHA-256 of title and text, as 64 hex digits."""
        return content_hash(self.title, self.text)


def content_hash(title: str, text: str) -> str:
    """SHA-256 of both, the title's length first, so that no two pairs are one string."""
    parts = title.encode(errors="surrogatepass"), text.encode(errors="surrogatepass")
    return hashlib.sha256(len(parts[0]).to_bytes(8, "big") + parts[0] + parts[1]).hexdigest()


@dataclass(frozen=True, slots=True)
class Record:
    """A document as the catalogue has it. `version` counts its contents from 1; times are seconds since 1970."""

    document: Document
    version: int
    created_at: float
    updated_at: float
    passages: int

    @property
    def id(self) -> str:
        return self.document.id


@dataclass(frozen=True, slots=True)
class Change:
    """What adding a document did: `unchanged` if it was there so. `forgotten_chunks` were computed from its past."""

    record: Record
    status: Status
    forgotten_chunks: int = 0


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document, as it stands in prompts. `key` is never used twice: other content has another key."""

    key: int
    document_id: str
    position: int
    version: int
    title: str
    text: str
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def for_template(self) -> dict[str, str]:
        """As chat templates take documents."""
        return {"title": self.title, "text": self.text}


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A passage and how well it fits: the cosine of its and the question's vectors. None if the caller brought it."""

    passage: Passage
    score: float | None = None


def updated(document: Document, changes: Mapping[str, Any]) -> Document:
    """`document` with some of its fields changed. Raises DocumentError for names that are none."""
    unknown = set(changes) - {"text", "title", "metadata", "expires_at", "pinned", "system_prompt"}
    if unknown:
        raise DocumentError(f"a document has no field '{min(unknown)}' that can be updated", param=min(unknown))
    if changes.get("pinned") is False:
        changes = {"system_prompt": None, **changes}
    return replace(document, **changes)


def _check_id(name: str) -> None:
    problem = None
    if len(name) > MAX_ID:
        problem = f"has more than {MAX_ID} characters"
    elif not name.isprintable():
        problem = "holds control characters or half a surrogate pair"
    elif name != name.strip() or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
        problem = "must not begin or end with spaces or slashes, nor hold '//', './' or '../': it is part of a URL"
    if problem:
        raise DocumentError(f"the document id {name[:64]!r} {problem}", param="id")


def _check_metadata(metadata: Mapping[str, Value]) -> None:
    if len(metadata) > MAX_METADATA:
        raise DocumentError(f"metadata may have {MAX_METADATA} entries, not {len(metadata)}", param="metadata")
    for name, value in metadata.items():
        if not _is_storable(name, value):
            raise DocumentError(
                f"metadata values are what JSON can hold, of up to {MAX_METADATA_VALUE} characters and "
                f"{MAX_METADATA_LEVELS} levels; {name[:64]!r} is not",
                param=f"metadata.{name[:64]}",
            )


def _is_storable(name: str, value: Value) -> bool:
    """Whether what is read back from JSON in UTF-8 is what it was."""
    if _is_deeper(value, MAX_METADATA_LEVELS):
        return False
    try:
        text = json.dumps({name: value}, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError):  # an object, infinity, half of a surrogate pair
        return False
    return len(text) <= MAX_METADATA_VALUE


def _is_deeper(value: Value, levels: int) -> bool:
    """Whether lists and objects stand in one another on more than so many levels."""
    if isinstance(value, str) or not isinstance(value, Sequence | Mapping):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inner)
