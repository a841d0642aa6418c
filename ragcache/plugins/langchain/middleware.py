"""Retrieval for LangChain's agents: each run's model calls get the documents of its question.

    agent = create_agent(model, tools, middleware=[DocumentsMiddleware(retriever)])

Invariant: a run retrieves once, before its first model call, so that all its model calls have the same documents and
each finds the prompt of the one before in the cache.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.retrievers import BaseRetriever

from stemcache.ragcache.plugins.langchain.chat_model import ChatStemcache


class DocumentsState(AgentState[Any]):
    """An agent's state, with the documents that its answer is made from."""

    documents: NotRequired[list[Document]]  # type: ignore[valid-type]  # mypy skips LangChain, and its base is no TypedDict


class DocumentsMiddleware(AgentMiddleware[DocumentsState, Any, Any]):
    """Gives the model, a ChatStemcache, what `retriever` finds for the last human message.

    The agent's result has it as `documents`. Nothing is retrieved where there is no human message.
    """

    state_schema = DocumentsState

    def __init__(self, retriever: BaseRetriever) -> None:
        super().__init__()
        self.retriever = retriever

    def before_agent(self, state: DocumentsState, runtime: Any) -> dict[str, Any] | None:
        question = _question(state)
        return None if question is None else {"documents": self.retriever.invoke(question)}

    async def abefore_agent(self, state: DocumentsState, runtime: Any) -> dict[str, Any] | None:
        question = _question(state)
        return None if question is None else {"documents": await self.retriever.ainvoke(question)}

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        return handler(_with_documents(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        return await handler(_with_documents(request))


def _question(state: Mapping[str, Any]) -> str | None:
    asked = [message.text for message in state["messages"] if isinstance(message, HumanMessage)]
    return str(asked[-1]) if asked else None


def _with_documents(request: ModelRequest[Any]) -> ModelRequest[Any]:
    documents = request.state.get("documents")
    if not documents:
        return request
    if not isinstance(request.model, ChatStemcache):
        raise TypeError(
            f"DocumentsMiddleware gives documents to a ChatStemcache, and the agent's model is a "
            f"{type(request.model).__name__}: make it with ChatStemcache(...)"
        )
    return request.override(model_settings={**request.model_settings, "documents": documents})
