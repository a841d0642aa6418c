"""The error branch of documents and retrieval (its root stands in stemcache.prefixtree.errors).

InvalidRequestError (engine)
├── DocumentError              the document, its id, metadata or time cannot be taken
│   └── DocumentNotFoundError  no document of this owner has the id
└── NoDocumentsError           there is nothing to retrieve from
StemcacheError
├── CatalogueError             the file of documents cannot be opened, read or written
├── CalibrationError           the questions that try whether documents can be moved cannot be used
├── EmbedderError              texts could not be embedded, or by another embedder than the catalogue's
├── ServerAnswerError          a server does not answer, or it refuses
└── MissingExtraError          a library is not installed; the message names the command that does it
"""

from __future__ import annotations

from stemcache.engine.errors import InvalidRequestError
from stemcache.prefixtree.errors import StemcacheError


class DocumentError(InvalidRequestError):
    """A document that cannot be taken; `param` names its field."""


class DocumentNotFoundError(DocumentError):
    """No document of this owner has the id."""

    def __init__(self, document_id: str) -> None:
        super().__init__(
            f"There is no document '{document_id}': it was never added, was deleted, or its time was over.",
            param="id",
            code="document_not_found",
        )


class NoDocumentsError(InvalidRequestError):
    """Retrieval was asked for, and there is nothing to find."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param="rag", code="no_documents")


class CatalogueError(StemcacheError):
    """The catalogue's file cannot be used; the message says why and what to do."""


class CalibrationError(StemcacheError):
    """Questions that cannot be read, or are too few; the message says what is missing."""


class EmbedderError(StemcacheError):
    """Texts could not be embedded; the message says why and what to do."""


class ServerAnswerError(StemcacheError):
    """A server does not answer, or it refuses; `code` is then the one of docs/http-api.md."""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class MissingExtraError(StemcacheError):
    """A library that is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; run: pip install 'stemcache[{extra}]'")
