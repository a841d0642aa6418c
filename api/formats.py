"""The two shapes of OpenAI's answers: text completions and chat completions, whole and as chunks of a stream.

Invariant: a format is one answer's: all its chunks carry the same id and time, and the chunks of each choice, put
together, say what the whole answer would.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stemcache._version import __version__
from stemcache.api.generation import Choice, Generation
from stemcache.api.logprobs import ChatLogprobs, CompletionLogprobs
from stemcache.api.tool_calls import ToolCallWriter
from stemcache.api.tools import ToolUse
from stemcache.engine.outputs import Delta, Usage

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine

Json = dict[str, Any]


class Format(ABC):
    """What the two shapes share: the envelope and the usage."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def __init__(self, engine: Engine, *, logprobs: bool) -> None:
        self._engine = engine
        self._logprobs = logprobs
        self._id = self.id_prefix + uuid.uuid4().hex
        self._created = int(time.time())

    def response(self, choices: Sequence[Choice], usage: Usage) -> Json:
        """The whole answer."""
        return self._envelope(self.object_name, [self._choice(choice) for choice in choices]) | _usage(usage)

    async def chunks(self, generation: Generation, *, include_usage: bool) -> AsyncIterator[Json]:
        """The answer as a stream. With `include_usage` a last chunk, without choices, has it; all others have null."""
        no_usage: Json = {"usage": None} if include_usage else {}
        async for item in generation.deltas():
            for choice in self._chunk_choices(item.choice, item.delta):
                yield self._envelope(self.chunk_object_name, [choice]) | no_usage
        if include_usage:
            yield self._envelope(self.chunk_object_name, []) | _usage(generation.usage)

    def _envelope(self, object_name: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": self._engine.model_name,
            "system_fingerprint": f"stemcache-{__version__}",
            "choices": choices,
        }

    @abstractmethod
    def _choice(self, choice: Choice) -> Json:
        """One choice of the whole answer."""

    @abstractmethod
    def _chunk_choices(self, index: int, delta: Delta) -> Iterable[Json]:
        """The choices of the chunks, each of one choice, that tell `delta`."""


def _usage(usage: Usage) -> Json:
    """`cached_tokens` is there even when it is 0: clients read a missing field as "not known"."""
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }
    }


class CompletionFormat(Format):
    """/v1/completions. Its chunks have the shape of the whole answer."""

    id_prefix = "cmpl-"
    object_name = chunk_object_name = "text_completion"

    def __init__(self, engine: Engine, *, logprobs: bool) -> None:
        super().__init__(engine, logprobs=logprobs)
        self._writers: dict[int, CompletionLogprobs] = {}

    def _choice(self, choice: Choice) -> Json:
        logprobs = CompletionLogprobs(self._engine).write(choice.logprobs) if self._logprobs else None
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def _chunk_choices(self, index: int, delta: Delta) -> Iterator[Json]:
        if not (delta.text or delta.logprobs or delta.finish_reason):  # text may lag behind the tokens
            return
        logprobs = None
        if self._logprobs:
            writer = self._writers.setdefault(index, CompletionLogprobs(self._engine))
            logprobs = writer.write(delta.logprobs)
        yield {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}


class ChatFormat(Format):
    """/v1/chat/completions. A choice's first chunk has the role, its last one nothing but the finish reason."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, engine: Engine, *, logprobs: bool, tools: ToolUse | None = None) -> None:
        super().__init__(engine, logprobs=logprobs)
        self._begun: set[int] = set()
        self._writer = ChatLogprobs(engine)
        self._tools = tools
        self._calls: dict[int, ToolCallWriter] = {}

    def _choice(self, choice: Choice) -> Json:
        calls = self._call_writer(choice.index)
        return {
            "index": choice.index,
            "message": {"role": "assistant", "refusal": None} | calls.message(choice.text),
            "logprobs": self._writer.write(choice.logprobs) if self._logprobs else None,
            "finish_reason": calls.finish_reason(choice.finish_reason),
        }

    def _call_writer(self, index: int) -> ToolCallWriter:
        if index not in self._calls:
            self._calls[index] = ToolCallWriter(None if self._tools is None else self._tools.parser())
        return self._calls[index]

    def _chunk_choices(self, index: int, delta: Delta) -> Iterator[Json]:
        # The role waits for the first token, so that a client's time to first chunk is a time to first token.
        if index not in self._begun:
            self._begun.add(index)
            yield self._chunk_choice(index, {"role": "assistant", "content": ""})
        calls = self._call_writer(index)
        parts = list(calls.parts(delta.text, final=delta.finish_reason is not None))
        if delta.logprobs and not parts:
            parts.append({"content": ""})
        logprobs = self._writer.write(delta.logprobs) if self._logprobs else None
        for part in parts:
            yield self._chunk_choice(index, part, logprobs=logprobs)
            logprobs = None
        if delta.finish_reason is not None:
            yield self._chunk_choice(index, {}, finish_reason=calls.finish_reason(delta.finish_reason))

    def _chunk_choice(
        self, index: int, delta: Json, *, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
