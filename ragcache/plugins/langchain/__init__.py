"""stemcache for LangChain: `pip install 'stemcache[langchain]'`. See docs/langchain.md."""

from __future__ import annotations

from stemcache.ragcache.errors import MissingExtraError

try:
    from stemcache.ragcache.plugins.langchain.chain import create_documents_chain
    from stemcache.ragcache.plugins.langchain.chat_model import ChatStemcache
    from stemcache.ragcache.plugins.langchain.middleware import DocumentsMiddleware
    from stemcache.ragcache.plugins.langchain.retriever import StemcacheRetriever
except ImportError as error:
    raise MissingExtraError(error.name or "langchain", "langchain") from error

__all__ = ["ChatStemcache", "DocumentsMiddleware", "StemcacheRetriever", "create_documents_chain"]
