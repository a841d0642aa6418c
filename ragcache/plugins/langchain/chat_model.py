"""A LangChain chat model that takes documents beside the messages.

    model = ChatStemcache(model="stemcache-demo")
    answer = model.invoke("What is the code of Velmora?", documents=retriever.invoke("Velmora"))

Invariant: a request is langchain-openai's, plus `documents` and `rag`; so is an answer, plus the server's report of the
documents in `response_metadata["rag"]`, where it makes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from langchain_core.documents import Document
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils import secret_from_env
from langchain_openai.chat_models.base import BaseChatOpenAI
from pydantic import Field, SecretStr

from stemcache.ragcache.plugins.chat_fields import extra_body, template_document
from stemcache.ragcache.plugins.client import DEFAULT_URL, NO_KEY


class ChatStemcache(BaseChatOpenAI):
    """What ChatOpenAI is for OpenAI, for a stemcache server. Every call takes `documents` and `rag`, bound ones too.

    documents: texts, LangChain's documents (the title is the metadata's), or mappings with `title` and `text`.
    rag: have the server retrieve, such as `{"k": 4}`, or say how the documents are used: docs/documents.md.
    api_key: STEMCACHE_API_KEY of the environment unless given; an OpenAI key is never sent.
    """

    model_name: str = Field(alias="model")
    openai_api_base: str | None = Field(default=DEFAULT_URL, alias="base_url")
    openai_api_key: SecretStr | None = Field(
        default_factory=secret_from_env("STEMCACHE_API_KEY", default=NO_KEY), alias="api_key"
    )
    # Not ChatOpenAI: what that serialises is loaded again with the key of OPENAI_API_KEY.
    # Usage of streams is asked from OpenAI's own address only unless this says so.
    stream_usage: bool | None = True
    use_responses_api: bool | None = False

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: Literal["function_calling", "json_mode", "json_schema"] = "json_schema",
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """As ChatOpenAI's: by its schema, which needs no tools in the chat template."""
        made: Runnable[LanguageModelInput, Any] = super().with_structured_output(schema, method=method, **kwargs)
        return made

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def _llm_type(self) -> str:
        return "stemcache-chat"

    @property
    def lc_secrets(self) -> dict[str, str]:
        return {"openai_api_key": "STEMCACHE_API_KEY"}

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["stemcache", "ragcache", "plugins", "langchain"]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params: LangSmithParams = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "stemcache"
        return params

    def _get_request_payload(
        self,
        input_: LanguageModelInput,
        *,
        stop: list[str] | None = None,
        documents: Sequence[Document | Mapping[str, str] | str] | None = None,
        rag: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        payload: dict[str, Any] = super()._get_request_payload(input_, stop=stop, **kwargs)
        given = None if documents is None else [as_template_document(each) for each in documents]
        if more := extra_body(payload.get("extra_body"), given, rag):
            payload["extra_body"] = more
        return payload

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        result: ChatResult = super()._create_chat_result(response, generation_info)
        extra = response if isinstance(response, dict) else response.model_extra or {}
        if "rag" in extra:
            for generation in result.generations:
                generation.message.response_metadata["rag"] = extra["rag"]
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        if "rag" in chunk:  # in the first of a stream
            base_generation_info = {**(base_generation_info or {}), "rag": chunk["rag"]}
        made: ChatGenerationChunk | None = super()._convert_chunk_to_generation_chunk(
            chunk, default_chunk_class, base_generation_info
        )
        return made


def as_template_document(document: Document | Mapping[str, str] | str) -> Mapping[str, str] | str:
    """A document as the server takes it."""
    if isinstance(document, Document):
        return template_document(document.metadata.get("title"), document.page_content)
    return document
