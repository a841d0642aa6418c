"""The documents of a server, as its command line asks for them."""

from __future__ import annotations

import argparse
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from stemcache.api.settings import Settings
from stemcache.ragcache.errors import MissingExtraError

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine
    from stemcache.ragcache.context_cache import ContextCache

_log = logging.getLogger(__name__)


def open_documents(
    options: argparse.Namespace, settings: Settings, engine: Engine
) -> AbstractContextManager[ContextCache | None]:
    """The documents; None where their libraries are missing and nobody asked for documents.

    Raises CatalogueError, EmbedderError, MissingExtraError.
    """
    if engine.prompts.backend is None:
        return nullcontext(None)
    try:
        from stemcache.ragcache.context_cache import ContextCache
        from stemcache.ragcache.embedders import embedder_of

        return ContextCache(
            engine,
            folder=options.documents,
            embedder=embedder_of(options.embedder, model=options.embedding_model, api_key=settings.embeddings_api_key),
            index=options.index,
            passage_tokens=options.passage_tokens,
            speculate=not options.no_speculation,
        )
    except MissingExtraError as error:
        if options.documents is not None or options.embedder != "hashing":
            raise
        _log.info("there are no document routes: %s", error)
        return nullcontext(None)
