"""A Haystack chat generator that takes documents beside the messages.

Invariant: a request is OpenAIChatGenerator's, plus `documents` and `rag`.
"""

from __future__ import annotations

from typing import Any

from haystack import Document, component
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage, StreamingCallbackT
from haystack.tools import ToolsType
from haystack.utils import Secret

from stemcache.ragcache.plugins.chat_fields import extra_body, template_document
from stemcache.ragcache.plugins.client import DEFAULT_URL, NO_KEY


@component
class StemcacheChatGenerator(OpenAIChatGenerator):
    """OpenAIChatGenerator for a stemcache server: connect a retriever's `documents` with its own.

    api_key: STEMCACHE_API_KEY of the environment unless given, none where that is not set; an OpenAI key is never sent.
    Other arguments are OpenAIChatGenerator's.
    """

    def __init__(
        self,
        model: str,
        *,
        api_key: Secret = Secret.from_env_var("STEMCACHE_API_KEY", strict=False),  # noqa: B008  (Haystack's way)
        api_base_url: str = DEFAULT_URL,
        streaming_callback: StreamingCallbackT | None = None,
        organization: str | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        tools: ToolsType | None = None,
        tools_strict: bool = False,
        http_client_kwargs: dict[str, Any] | None = None,
    ) -> None:
        # Haystack makes components anew, so that `super()` finds another class than the object's.
        OpenAIChatGenerator.__init__(
            self,
            api_key=api_key,
            model=model,
            streaming_callback=streaming_callback,
            api_base_url=api_base_url,
            organization=organization,
            generation_kwargs=generation_kwargs,
            timeout=timeout,
            max_retries=max_retries,
            tools=tools,
            tools_strict=tools_strict,
            http_client_kwargs=http_client_kwargs,
        )

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage] | str,
        documents: list[Document] | None = None,
        rag: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        tools: ToolsType | None = None,
        tools_strict: bool | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answer from documents. A reply's `meta["usage"]` tells how many tokens were cached.

        documents: those that have texts; the title is the meta's. rag: have the server retrieve, such as `{"k": 4}`, or
        say how the documents are used: docs/documents.md. The rest is OpenAIChatGenerator's.
        """
        return OpenAIChatGenerator.run(  # type: ignore[no-any-return]
            self,
            messages,
            streaming_callback,
            self._with_documents(generation_kwargs, documents, rag),
            tools=tools,
            tools_strict=tools_strict,
        )

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self,
        messages: list[ChatMessage] | str,
        documents: list[Document] | None = None,
        rag: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        *,
        tools: ToolsType | None = None,
        tools_strict: bool | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """As `run`."""
        return await OpenAIChatGenerator.run_async(  # type: ignore[no-any-return]
            self,
            messages,
            streaming_callback,
            self._with_documents(generation_kwargs, documents, rag),
            tools=tools,
            tools_strict=tools_strict,
        )

    def _client_kwargs(self) -> dict[str, Any]:
        return {**OpenAIChatGenerator._client_kwargs(self), "api_key": self.api_key.resolve_value() or NO_KEY}

    def _with_documents(
        self, generation_kwargs: dict[str, Any] | None, documents: list[Document] | None, rag: dict[str, Any] | None
    ) -> dict[str, Any]:
        given = {**self.generation_kwargs.get("extra_body", {}), **(generation_kwargs or {}).get("extra_body", {})}
        texts = None if documents is None else [_as_template_document(each) for each in documents]
        more = extra_body(given, texts, rag)
        return {**(generation_kwargs or {}), **({"extra_body": more} if more else {})}


def _as_template_document(document: Document) -> dict[str, str]:
    if document.content is None:
        raise ValueError(f"document {document.id} has no text for the model to read; leave out what is no text")
    return template_document(document.meta.get("title"), document.content)
