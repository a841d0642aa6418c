"""Embedders: texts to vectors of length one, so that the inner product of two is their cosine.

Invariant: `name` says everything that a vector depends on beside the text. Vectors of different names are never
compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Protocol

import httpx
import numpy as np
from numpy.typing import NDArray

from stemcache.ragcache.errors import EmbedderError, MissingExtraError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import HashingVectorizer

Vectors = NDArray[np.float32]

# In chunks of so many texts, so that a body stays small: OpenAI takes up to 2,048 of them, and 300,000 tokens in all.
_TEXTS_PER_REQUEST: Final = 64


class Embedder(Protocol):
    """What retrieval needs of an embedder. From any thread; both methods raise EmbedderError."""

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> int: ...

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Vectors `[n, dimensions]`, float32, of length one (or zero, for a text without anything in it)."""
        ...

    def embed_question(self, text: str) -> Vectors:
        """The vector `[dimensions]` of a question."""
        ...


class HashingEmbedder:
    """The default: counts of groups of three to five letters, hashed. Needs no download, no training and no language.

    It finds words that the question and the document share, inflected ones too, and no synonyms.

    Raises MissingExtraError.
    """

    def __init__(self, dimensions: int = 2048) -> None:
        if find_spec("sklearn") is None:
            raise MissingExtraError("scikit-learn", "rag")
        self.name = f"hashing-char_wb-3-5-{dimensions}"
        self.dimensions = dimensions

    @cached_property
    def _vectorizer(self) -> HashingVectorizer:
        """Made when it is first needed: the library takes longer to load than all the rest of a server."""
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(
            n_features=self.dimensions, analyzer="char_wb", ngram_range=(3, 5), norm="l2", dtype=np.float32
        )

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        return np.asarray(self._vectorizer.transform(texts).toarray(), np.float32)

    def embed_question(self, text: str) -> Vectors:
        return np.asarray(self.embed_documents([text])[0])


class SentenceTransformerEmbedder:
    """A model of the sentence-transformers library, by folder or hub name; needs the extra `embeddings`.

    Raises MissingExtraError, EmbedderError when it cannot be loaded.
    """

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtraError("sentence-transformers", "embeddings") from None
        try:
            self._model: Any = SentenceTransformer(model, device="cpu")
        except Exception as error:  # a folder or a hub, each with many ways to fail
            raise EmbedderError(f"the embedding model {model!r} cannot be loaded: {error}") from error
        self.name = f"sentence-transformers-{model}"
        self.dimensions = int(self._model.get_embedding_dimension())

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        return self._encode(self._model.encode_document, texts)

    def embed_question(self, text: str) -> Vectors:
        return np.asarray(self._encode(self._model.encode_query, [text])[0])

    def _encode(self, encode: Any, texts: Sequence[str]) -> Vectors:
        if not texts:
            return np.empty((0, self.dimensions), np.float32)
        vectors = encode(list(texts), normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


class EndpointEmbedder:
    """Any endpoint with OpenAI's `POST {url}/embeddings`, such as vLLM, llama.cpp, Ollama, TEI or OpenAI itself.

    Raises EmbedderError when it cannot be reached: it is asked once for the length of its vectors.
    """

    def __init__(self, url: str, model: str, *, api_key: str | None = None, timeout: float = 60) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._url = url.rstrip("/")
        self._model = model
        self._client = httpx.Client(headers=headers, timeout=timeout)
        self.name = f"endpoint-{model}"
        self.dimensions = self._ask(["dimensions"]).shape[1]

    def embed_documents(self, texts: Sequence[str]) -> Vectors:
        parts = [texts[at : at + _TEXTS_PER_REQUEST] for at in range(0, len(texts), _TEXTS_PER_REQUEST)]
        return np.concatenate([np.empty((0, self.dimensions), np.float32), *map(self._ask, parts)])

    def embed_question(self, text: str) -> Vectors:
        return np.asarray(self._ask([text])[0])

    def _ask(self, texts: Sequence[str]) -> Vectors:
        body = {"model": self._model, "input": list(texts), "encoding_format": "float"}
        try:
            response = self._client.post(f"{self._url}/embeddings", json=body)
            response.raise_for_status()
            data = sorted(response.json()["data"], key=lambda each: each["index"])
            vectors = np.array([each["embedding"] for each in data], np.float32)
        except httpx.HTTPStatusError as error:
            said = error.response.text[:200]
            raise EmbedderError(f"{self._url} refuses to embed ({error.response.status_code}): {said}") from error
        except httpx.HTTPError as error:
            raise EmbedderError(f"{self._url} cannot be asked for embeddings: {error}") from error
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise EmbedderError(f"{self._url} does not answer with OpenAI's embeddings: {error!r}") from error
        known = getattr(self, "dimensions", None)
        if vectors.ndim != 2 or len(vectors) != len(texts) or vectors.shape[1] != (known or vectors.shape[1]):
            raise EmbedderError(f"{self._url} answers {len(texts)} texts with vectors of shape {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise EmbedderError(f"{self._url} answers with numbers that are none")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.where(lengths == 0, 1, lengths), np.float32)


def embedder_of(choice: str, *, model: str | None = None, api_key: str | None = None) -> Embedder:
    """The embedder of `hashing`, of an endpoint's URL with a model, or else of a sentence-transformers model.

    Raises EmbedderError, MissingExtraError.
    """
    if choice == "hashing":
        return HashingEmbedder()
    if choice.startswith(("http://", "https://")):
        if model is None:
            raise EmbedderError("an embeddings endpoint needs the name of its model: --embedding-model NAME")
        return EndpointEmbedder(choice, model, api_key=api_key)
    return SentenceTransformerEmbedder(choice)
