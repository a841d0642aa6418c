"""The answers' shapes as pydantic models: what the OpenAPI description says of them.

Invariant: every answer that the routes of this package give is one of these. The routes build plain dictionaries, so
that a token costs no validation; the tests hold the two against each other.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Every error, whatever its status."""

    error: ErrorDetail


class PromptTokensDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int
    moved_tokens: int | None = None


class UsageAnswer(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(Answer):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TextLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Envelope(Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: UsageAnswer


class TextAnswer(Envelope):
    """POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobAnswer(TopLogprob):
    top_logprobs: list[TopLogprob]


class MessageLogprobs(Answer):
    content: list[TokenLogprobAnswer]
    refusal: None


class CalledFunctionAnswer(Answer):
    name: str
    arguments: str


class ToolCallAnswer(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ToolCallAnswer] | None = None


class MessageChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: MessageLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = None


class RagDocument(Answer):
    id: str | None
    passage: int | None
    version: int | None
    title: str
    score: float | None
    tokens: int
    cached_tokens: int
    moved_tokens: int
    computed_tokens: int
    reuse: Literal["all", "part", "none", "moved"]
    why: str | None


class RagAnswer(Answer):
    """What an answer was made from."""

    documents: list[RagDocument]
    notes: list[str]


class ChatAnswer(Envelope):
    """POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[MessageChoice]
    rag: RagAnswer | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str


class Version(Answer):
    version: str


class Health(Answer):
    status: str
    running: int
    waiting: int


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is refused; `param` and `code` say why."},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot answer."},
}


_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON; [DONE] at the end."}},
}


def documented(answer: type[Answer], *, streamed: bool = False) -> dict[str, Any]:
    """Arguments of a route that answers with `answer`, or with server-sent events too where it can stream."""
    described: dict[str, Any] = {"model": answer, "description": answer.__doc__ or "The answer."}
    if streamed:
        described["content"] = {"text/event-stream": {"schema": _EVENT}}
    return {"response_model": None, "responses": {200: described, **ERRORS}}
