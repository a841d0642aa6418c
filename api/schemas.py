"""The request bodies of the two completion routes.

Invariant: nothing is silently ignored. A field that is not declared is refused with its path, unless it is known to
change nothing: it is null, or a no-op for any server without accounts, or asks for what happens anyway.
Ranges of sampling parameters are not repeated here; SamplingParams owns them.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from stemcache.api.request_model import RequestModel, Text, encodable
from stemcache.api.structured import ResponseFormat, StructuredOutputs, grammar_of
from stemcache.api.tools import Tool, ToolCall, ToolChoice
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.sampling import MAX_LOGPROBS, SamplingParams


class StreamOptions(RequestModel):
    include_usage: bool = False

    neutral = {"continuous_usage_stats": (False,)}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingRequest(RequestModel):
    """What both routes share."""

    model: str | None = Field(default=None, description="The served model's id; may be left out, there is only one.")
    cache_salt: Annotated[Text, Field(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Requests with different salts never find each other's chunks."
    )
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    n: int | None = None
    presence_penalty: float | None = None
    priority: int | None = Field(default=None, description="Of your waiting requests the smallest goes first.")
    repetition_penalty: float | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: Annotated[list[Text] | None, BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None)] = None
    stop_token_ids: list[int] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: float | None = None
    top_k: int | None = Field(default=None, description="0 or -1: all tokens.")
    top_p: float | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("'stream_options' needs 'stream': true.", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError."""
        return SamplingParams(**self._given())

    def _given(self) -> dict[str, Any]:
        """The sampling parameters that the caller set; the defaults of the others are SamplingParams'."""
        # Text and chat completions ask for log-probabilities in different ways, which are the subclasses' business.
        shared = {field.name for field in dataclasses.fields(SamplingParams)} - {"logprobs"}
        given = {name: getattr(self, name) for name in self.model_fields_set & shared}
        if given.get("top_k") == -1:  # vLLM's spelling of "off"
            given["top_k"] = 0
        given["grammar"] = grammar_of(self.response_format, self.structured_outputs)
        return given


def _parse_prompts(value: Any) -> list[str] | list[list[int]]:
    """The four forms of `prompt` as a list of prompts.

    By hand, as pydantic would try each of the four forms on each element and report the failures of all of them.
    """
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _is_token_ids(value)) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")
    if all(isinstance(prompt, str) for prompt in prompts):
        return [encodable(prompt) for prompt in prompts]
    if all(isinstance(prompt, list) and _is_token_ids(prompt) for prompt in prompts):
        return prompts
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")


def _is_token_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(token) is int for token in value)


Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Prompts
    best_of: int | None = None
    logprobs: int | None = Field(default=None, description="Alternatives to report with each token.")

    neutral = {
        "echo": (False,),
        "store": (False,),
        "suffix": ("",),
        "min_tokens": (0,),
        "add_special_tokens": (True,),
        "skip_special_tokens": (True,),
    }

    def sampling_params(self) -> SamplingParams:
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequestError(
                "'best_of' is not supported, unless it equals 'n'.", param="best_of", code="unsupported_parameter"
            )
        return SamplingParams(**self._given(), logprobs=self.logprobs)


class TextPart(RequestModel):
    """A content part. Parts of other types are refused."""

    type: Literal["text"]
    text: Text


def _as_parts(value: Any) -> Any:
    if value is None:
        raise ValueError("must be a string or a list of text parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(RequestModel):
    """A message. Which roles there are is the chat template's business."""

    role: Text = Field(min_length=1)
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: Text | None = None
    content: Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])]
    name: Text | None = None

    # Clients send the assistant messages that they were given back as they are.
    neutral = {"annotations": ([],)}
    # The openai package's `parse` adds this for its caller, and sends it back with the message.
    no_ops = frozenset({"parsed"})

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, fields: Any) -> Any:
        calls = isinstance(fields, dict) and fields.get("tool_calls")
        return {**fields, "content": []} if calls and fields.get("content") is None else fields

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it; several parts are joined by line breaks, as vLLM does."""
        message: dict[str, Any] = {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        message |= {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        return (
            message | {"tool_calls": [call.for_template() for call in self.tool_calls]} if self.tool_calls else message
        )


class Document(RequestModel):
    """A retrieved document."""

    text: Text
    title: Text = ""


def _as_document(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    documents: (
        list[Annotated[Document, BeforeValidator(_as_document, json_schema_input_type=str | Document)]] | None
    ) = Field(default=None, description="Retrieved documents, in the order in which the chat template is to show them.")
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool = True
    tool_choice: ToolChoice | None = None
    tools: list[Tool] = Field(default_factory=list)

    neutral = {
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "functions": ([],),
        "function_call": ("none",),
        "min_tokens": (0,),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "skip_special_tokens": (True,),
        "store": (False,),
    }

    def sampling_params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                "'max_tokens' and 'max_completion_tokens' differ; give one of them.", param="max_completion_tokens"
            )
        # Chat has no default limit: without one an answer ends when the model ends it, or the context is full.
        given = self._given() | {"max_tokens": limits.pop() if limits else None}
        return SamplingParams(**given, logprobs=(self.top_logprobs or 0) if self.logprobs else None)
