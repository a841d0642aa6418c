"""Messages and documents of a conversation, as requests bring them and as chat templates take them.

Invariant: what a template is given says all that the request said; parts that it could not be told are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stemcache.api.cache_hints import CacheControl, PromptCacheBreakpoint
from stemcache.api.request_model import RequestModel
from stemcache.api.texts import Text
from stemcache.api.tools import Tool, ToolCall


class TextPart(RequestModel):
    """A content part. Parts of other types are refused."""

    type: Literal["text"]
    text: Text
    prompt_cache_breakpoint: PromptCacheBreakpoint | None = None
    cache_control: CacheControl | None = None


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


class TemplateFields(RequestModel):
    """How a conversation becomes a prompt, apart from its messages."""

    add_generation_prompt: bool | None = Field(default=None, description="End where an answer begins; the default.")
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Values for the chat template's own variables."
    )
    continue_final_message: bool = Field(default=False, description="Let the model go on with the last message.")
    documents: (
        list[Annotated[Document, BeforeValidator(_as_document, json_schema_input_type=str | Document)]] | None
    ) = Field(default=None, description="Retrieved documents, in the order in which the chat template is to show them.")

    tools: list[Tool] = Field(default_factory=list)

    @property
    def template_kwargs(self) -> dict[str, Any]:
        return self.chat_template_kwargs or {}
