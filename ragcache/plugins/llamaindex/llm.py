"""A LlamaIndex LLM that takes documents beside the messages.

Invariant: a request is OpenAILike's, plus `documents` and `rag`. An answer's `raw` is the server's, in which `rag`
tells of the documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import get_from_param_or_env
from llama_index.llms.openai_like import OpenAILike

from stemcache.ragcache.plugins.chat_fields import extra_body
from stemcache.ragcache.plugins.client import DEFAULT_URL, NO_KEY


class Stemcache(OpenAILike):
    """OpenAILike for a stemcache server. `documents` and `rag` may be given to every call.

    documents: texts, or mappings with `title` and `text`. rag: have the server retrieve, such as `{"k": 4}`, or say how
    the documents are used: docs/documents.md.
    api_key: STEMCACHE_API_KEY of the environment unless given; an OpenAI key is never sent.
    Other arguments are OpenAILike's.
    """

    def __init__(
        self,
        model: str,
        *,
        api_base: str = DEFAULT_URL,
        api_key: str | None = None,
        is_chat_model: bool = True,
        **kwargs: Any,
    ) -> None:
        key = get_from_param_or_env("api_key", api_key, "STEMCACHE_API_KEY", NO_KEY)
        super().__init__(model=model, api_base=api_base, api_key=key, is_chat_model=is_chat_model, **kwargs)

    @classmethod
    def class_name(cls) -> str:
        return "Stemcache"

    def _get_model_kwargs(
        self,
        *,
        documents: Sequence[Mapping[str, str] | str] | None = None,
        rag: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        made: dict[str, Any] = super()._get_model_kwargs(**kwargs)
        if made.get("stream"):
            made.setdefault("stream_options", {"include_usage": True})
        # OpenAILike lets what the constructor was given hide what the call was given.
        given = {**self.additional_kwargs.get("extra_body", {}), **kwargs.get("extra_body", {})}
        if more := extra_body(given, documents, rag):
            made["extra_body"] = more
        return made
