"""The request bodies of the two completion routes.

Invariant: nothing is silently ignored. A field that is not declared is refused with its path, unless it is known to
change nothing: it is null, or a no-op for any server without accounts, or asks for what happens anyway.
Ranges of sampling parameters are not repeated here; SamplingParams owns them.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stemcache.api.cache_hints import ImplicitCacheOptions
from stemcache.api.document_schemas import RagOptions
from stemcache.api.formats import AnswerOptions
from stemcache.api.messages import Message, TemplateFields
from stemcache.api.request_model import RequestModel, with_examples
from stemcache.api.structured import ResponseFormat, StructuredOutputs, grammar_of
from stemcache.api.texts import Prompts, Text
from stemcache.api.tools import ToolChoice
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.sampling import MAX_CHOICES, MAX_LOGPROBS, SamplingParams


class StreamOptions(RequestModel):
    include_usage: bool = False
    continuous_usage_stats: bool = Field(default=False, description="Usage so far in every chunk.")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingRequest(RequestModel):
    """What both routes share."""

    model: str | None = Field(default=None, description="The served model's id; may be left out, there is only one.")
    allowed_token_ids: list[int] | None = None
    bad_words: list[Text] | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Requests with different salts never find each other's chunks."
    )
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[Annotated[int, Field(strict=False)], float] | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    priority: int | None = Field(default=None, description="Of your waiting requests the smallest goes first.")
    prompt_cache_options: ImplicitCacheOptions = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_logprobs: int | None = Field(default=None, description="Alternatives to report with each prompt token.")
    repetition_penalty: float | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    seed: int | None = None
    skip_special_tokens: bool | None = None
    stop: Annotated[list[Text] | None, BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None)] = None
    stop_token_ids: list[int] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    temperature: float | None = None
    top_k: int | None = Field(default=None, description="0 or -1: all tokens.")
    top_p: float | None = None
    truncate_prompt_tokens: int | None = Field(default=None, description="Keep the last so many tokens of a prompt.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> SamplingRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("'stream_options' needs 'stream': true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError(
                "'prompt_logprobs' come with the whole answer only: leave 'stream' out.", param="prompt_logprobs"
            )
        return self

    @property
    def choices_wanted(self) -> int:
        """Of each prompt."""
        return self.n or 1

    @property
    def choices_generated(self) -> int:
        """Of each prompt; the best of them are those wanted."""
        return self.choices_wanted

    def answer_options(self, params: SamplingParams) -> AnswerOptions:
        """What to tell beside the text."""
        options = self.stream_options or StreamOptions()
        return AnswerOptions(
            logprobs=params.logprobs,
            prompt_logprobs=self.prompt_logprobs is not None,
            token_ids=self.return_token_ids,
            tokens_as_ids=self.return_tokens_as_token_ids,
            special_hidden=params.skip_special_tokens,
            usage_last=options.include_usage,
            usage_always=options.continuous_usage_stats,
        )

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


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    model_config = with_examples(
        {"prompt": "The code of Velmora is", "max_tokens": 8, "temperature": 0},
        {"prompt": ["One", "Two"], "max_tokens": 2, "n": 2, "logprobs": 2, "echo": True, "seed": 1},
        {"prompt": [[5, 6, 7]], "max_tokens": 0, "echo": True, "logprobs": 0, "prompt_logprobs": 1},
        {"prompt": "A", "max_tokens": 3, "stream": True, "return_token_ids": True},
        {"prompt": "A", "max_tokens": 3, "best_of": 3, "return_tokens_as_token_ids": True},
    )

    prompt: Prompts
    add_special_tokens: bool = True
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(default=None, description="Alternatives to report with each token.")

    neutral = {
        "store": (False,),
        "suffix": ("",),
    }

    @property
    def choices_generated(self) -> int:
        return self.best_of or self.choices_wanted

    def sampling_params(self) -> SamplingParams:
        """Of all choices that are to be generated: `best_of`, where it is given, not `n`."""
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("'max_tokens' may be 0 with 'echo' only; give at least 1.", param="max_tokens")
        given, logprobs = self._given(), self.logprobs
        if self.echo and logprobs is not None:
            given["prompt_logprobs"] = max(logprobs, self.prompt_logprobs or 0)
        if self.best_of is not None and self.best_of != self.choices_wanted:
            self._check_best_of(self.best_of)
            given["n"], logprobs = self.best_of, logprobs or 0
        return SamplingParams(**given, logprobs=logprobs)

    def answer_options(self, params: SamplingParams) -> AnswerOptions:
        return dataclasses.replace(super().answer_options(params), logprobs=self.logprobs, echo=self.echo)

    def _check_best_of(self, best_of: int) -> None:
        if best_of < self.choices_wanted:
            raise InvalidRequestError("'best_of' must be at least 'n'.", param="best_of")
        if self.stream:
            raise InvalidRequestError(
                "'best_of' cannot be streamed: which choices are the best is known at the end.", param="best_of"
            )


class ChatRequest(TemplateFields, SamplingRequest):
    """POST /v1/chat/completions."""

    model_config = with_examples(
        {"messages": [{"role": "user", "content": "What is the code of Velmora?"}], "max_tokens": 8},
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "What is its code?"}]}],
            "documents": [{"title": "Velmora", "text": "The code of Velmora is 7392."}, "Another text."],
            "max_completion_tokens": 4,
            "logprobs": True,
            "top_logprobs": 2,
            "prompt_logprobs": 1,
            "return_token_ids": True,
        },
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True},
    )

    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool = True
    rag: RagOptions | None = Field(default=None, description="Retrieve documents on the server (/v1/documents).")
    reasoning_effort: Text | None = Field(default=None, description="For chat templates that have such a variable.")
    tool_choice: ToolChoice | None = None

    neutral = {
        "echo": (False,),
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }

    @property
    def template_kwargs(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return super().template_kwargs | effort

    def name_of(self, param: str | None) -> str | None:
        """The field of this request that the engine, which knows nothing of messages, calls `param`."""
        if param == "prompt":
            return "messages"
        own_effort = self.reasoning_effort is not None and param == "chat_template_kwargs.reasoning_effort"
        return "reasoning_effort" if own_effort else param

    def sampling_params(self) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                "'max_tokens' and 'max_completion_tokens' differ; give one of them.", param="max_completion_tokens"
            )
        if 0 in limits:
            raise InvalidRequestError("'max_tokens' must be at least 1; an answer has tokens.", param="max_tokens")
        # Chat has no default limit: without one an answer ends when the model ends it, or the context is full.
        given = self._given() | {"max_tokens": limits.pop() if limits else None}
        return SamplingParams(**given, logprobs=(self.top_logprobs or 0) if self.logprobs else None)
