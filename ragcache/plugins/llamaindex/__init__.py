"""stemcache for LlamaIndex: `pip install 'stemcache[llamaindex]'`. See docs/llamaindex.md."""

from __future__ import annotations

from stemcache.ragcache.errors import MissingExtraError

try:
    from stemcache.ragcache.plugins.llamaindex.llm import Stemcache
    from stemcache.ragcache.plugins.llamaindex.retriever import StemcacheRetriever
    from stemcache.ragcache.plugins.llamaindex.synthesizer import DocumentSynthesizer
except ImportError as error:
    raise MissingExtraError(error.name or "llama-index-core", "llamaindex") from error

__all__ = ["DocumentSynthesizer", "Stemcache", "StemcacheRetriever"]
