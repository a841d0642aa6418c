"""A LlamaIndex response synthesizer that gives the model the documents apart.

    engine = RetrieverQueryEngine(retriever, DocumentSynthesizer(llm))

Invariant: one model call a question, with every node as one document. Nothing is packed, refined or cut.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE

from stemcache.ragcache.plugins.chat_fields import template_document
from stemcache.ragcache.plugins.llamaindex.llm import Stemcache

Usage = dict[str, Any]


class DocumentSynthesizer(BaseSynthesizer):
    """Answers a question from nodes. A response's `metadata["usage"]` is the server's, with the cached tokens.

    system_prompt: what stands before the documents. A streamed response's usage is there once it has ended.
    Raises ValueError for an LLM that takes no documents.
    """

    def __init__(self, llm: Stemcache, *, system_prompt: str = "", **kwargs: Any) -> None:
        if not isinstance(llm, Stemcache):
            raise ValueError(f"documents are given to a Stemcache LLM, not to a {type(llm).__name__}: Stemcache(model)")
        super().__init__(llm=llm, **kwargs)
        self._system_prompt = system_prompt

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        told = _of(nodes)
        response = super().synthesize(query, nodes, additional_source_nodes, **told, **response_kwargs)
        return _with_usage(response, told["usage"])

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        told = _of(nodes)
        response = await super().asynthesize(query, nodes, additional_source_nodes, **told, **response_kwargs)
        return _with_usage(response, told["usage"])

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        documents: Sequence[dict[str, str]] | None = None,
        usage: Usage | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """The answer, or its pieces when streaming. `documents`, where given, stand for `text_chunks`."""
        request = {"documents": text_chunks if documents is None else documents, **response_kwargs}
        usage = {} if usage is None else usage
        if self._streaming:
            return _deltas(self._llm.stream_chat(self._messages(query_str), **request), usage)
        return _text(self._llm.chat(self._messages(query_str), **request), usage)

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        documents: Sequence[dict[str, str]] | None = None,
        usage: Usage | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """As `get_response`."""
        request = {"documents": text_chunks if documents is None else documents, **response_kwargs}
        usage = {} if usage is None else usage
        if self._streaming:
            return _async_deltas(await self._llm.astream_chat(self._messages(query_str), **request), usage)
        return _text(await self._llm.achat(self._messages(query_str), **request), usage)

    def _messages(self, question: str) -> list[ChatMessage]:
        system = [ChatMessage(role=MessageRole.SYSTEM, content=self._system_prompt)] if self._system_prompt else []
        return [*system, ChatMessage(role=MessageRole.USER, content=question)]

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        """There are none."""


def _of(nodes: Sequence[NodeWithScore]) -> dict[str, Any]:
    """What `get_response` is told beside the texts."""
    return {"documents": [_document(each) for each in nodes], "usage": {}}


def _document(found: NodeWithScore) -> dict[str, str]:
    """A node as the model is to read it. Where its text tells the title already, it has none beside."""
    node = found.node
    title = node.metadata.get("title") if "title" in node.excluded_llm_metadata_keys else ""
    return template_document(title, node.get_content(metadata_mode=MetadataMode.LLM))


def _with_usage(response: Any, usage: Usage) -> Any:
    response.metadata = {**(response.metadata or {}), "usage": usage}
    return response


def _text(response: ChatResponse, usage: Usage) -> str:
    _note(response, usage)
    return response.message.content or ""


def _deltas(responses: Iterator[ChatResponse], usage: Usage) -> Iterator[str]:
    for each in responses:
        _note(each, usage)
        yield each.delta or ""


async def _async_deltas(responses: AsyncIterator[ChatResponse], usage: Usage) -> AsyncIterator[str]:
    async for each in responses:
        _note(each, usage)
        yield each.delta or ""


def _note(response: ChatResponse, usage: Usage) -> None:
    if response.raw is not None and response.raw.usage is not None:
        usage.update(response.raw.usage.model_dump())
