"""stemcache for Haystack: `pip install 'stemcache[haystack]'`. See docs/haystack.md."""

from __future__ import annotations

from stemcache.ragcache.errors import MissingExtraError

try:
    from stemcache.ragcache.plugins.haystack.chat_generator import StemcacheChatGenerator
    from stemcache.ragcache.plugins.haystack.document_store import StemcacheDocumentStore
    from stemcache.ragcache.plugins.haystack.retriever import StemcacheRetriever
except ImportError as error:
    raise MissingExtraError(error.name or "haystack-ai", "haystack") from error

__all__ = ["StemcacheChatGenerator", "StemcacheDocumentStore", "StemcacheRetriever"]
