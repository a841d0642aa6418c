"""The two shapes of OpenAI's answers: text completions and chat completions, whole and as chunks of a stream.

Invariant: a format is one answer's: all its chunks carry the same id and time, and the chunks of each choice, put
together, say what the whole answer would.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stemcache._version import __version__
from stemcache.api.generation import Choice, Generation
from stemcache.api.logprobs import ChatLogprobs, CompletionLogprobs, prompt_logprobs
from stemcache.api.tool_calls import ToolCallWriter
from stemcache.api.tools import ToolUse
from stemcache.engine.outputs import Delta, TokenLogprob, Usage

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What a request wants to be told beside the text.

    usage_last: a last chunk of a stream has the usage. usage_always: every chunk has that of so far.
    special_hidden: the text leaves special tokens out.
    """

    logprobs: int | None = None
    echo: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    special_hidden: bool = True
    usage_last: bool = False
    usage_always: bool = False


class Format(ABC):
    """What the two shapes share: the envelope and the usage."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def __init__(self, engine: Engine, generation: Generation, options: AnswerOptions) -> None:
        self._engine = engine
        self._generation = generation
        self._options = options
        self._id = self.id_prefix + uuid.uuid4().hex
        self._created = int(time.time())

    def response(self, choices: Sequence[Choice]) -> Json:
        """The whole answer."""
        answer = self._envelope(self.object_name, [self._choice(choice) for choice in choices])
        return answer | self._prompt_fields() | _usage(self._generation.usage)

    async def chunks(self) -> AsyncIterator[Json]:
        """The answer as a stream. With `usage_last` a last chunk, without choices, has the usage."""
        usage: Json = {"usage": None} if self._options.usage_last else {}
        first: Json | None = None
        told = 0
        async for item in self._generation.deltas():
            if first is None:  # not before: how much of the prompt was cached is known with the first token
                first = self._prompt_fields()
            told += len(item.delta.token_ids)
            if self._options.usage_always:  # of what was told so far: the engine may be ahead
                usage = _usage(dataclasses.replace(self._generation.usage, completion_tokens=told))
            for choice in self._chunk_choices(item.choice, item.delta):
                yield self._envelope(self.chunk_object_name, [choice]) | first | usage
                first = {}
        if self._options.usage_last:
            yield self._envelope(self.chunk_object_name, []) | _usage(self._generation.usage)

    def _prompt_fields(self) -> Json:
        """What the whole answer, or the first chunk, tells of the prompt; nothing where the choices tell it."""
        return {}

    def _token_ids(self, ids: Sequence[int]) -> Json:
        return {"token_ids": list(ids)} if self._options.token_ids else {}

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
    """`cached_tokens` is there even when it is 0: clients read a missing field as "not known". `moved_tokens` are told
    where there are any, for then the answer is not exactly the model's."""
    moved = {"moved_tokens": usage.moved_tokens} if usage.moved_tokens else {}
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.cache_write_tokens,
                **moved,
            },
        }
    }


class CompletionFormat(Format):
    """/v1/completions. Its chunks have the shape of the whole answer, and an echoed prompt has one of its own."""

    id_prefix = "cmpl-"
    object_name = chunk_object_name = "text_completion"

    def __init__(self, engine: Engine, generation: Generation, options: AnswerOptions) -> None:
        super().__init__(engine, generation, options)
        self._writers: dict[int, CompletionLogprobs] = {}

    def _choice(self, choice: Choice) -> Json:
        echo = self._echo(choice.index, choice.prompt)
        logprobs = self._logprobs(choice.index, choice.logprobs)
        if logprobs is not None and echo["logprobs"] is not None:
            logprobs = {name: echo["logprobs"][name] + values for name, values in logprobs.items()}
        return {
            "index": choice.index,
            "text": echo["text"] + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            **self._prompt_of_choice(choice.prompt),
            **self._token_ids(choice.token_ids),
        }

    def _chunk_choices(self, index: int, delta: Delta) -> Iterator[Json]:
        first: Json = {}
        if index not in self._writers:
            prompt = self._generation.prompt_index(index)
            echo = self._echo(index, prompt)
            first = self._prompt_of_choice(prompt)
            if self._options.echo:
                yield {"index": index, **echo, "finish_reason": None, **first, **self._token_ids(())}
                first = {}
        told = delta.token_ids if self._options.token_ids else ()
        if not (delta.text or delta.logprobs or delta.finish_reason or told):  # text may lag behind the tokens
            return
        yield {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, delta.logprobs),
            "finish_reason": delta.finish_reason,
            **first,
            **self._token_ids(delta.token_ids),
        }

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Json | None:
        return None if self._options.logprobs is None else self._writers[index].write(logprobs)

    def _echo(self, index: int, prompt: int) -> Json:
        """The prompt's text and log-probabilities, where they are asked for. Comes before the choice's own."""
        options = self._options
        writer = self._writers[index] = CompletionLogprobs(
            self._engine, tokens_as_ids=options.tokens_as_ids, special_hidden=options.special_hidden
        )
        if not options.echo:
            return {"text": "", "logprobs": None}
        given = self._generation.prompts[prompt]
        text = given.text
        if text is None:
            text = self._engine.decode(given.token_ids, skip_special_tokens=options.special_hidden)
        logprobs = None
        if options.logprobs is not None:
            known = self._generation.prompt_logprobs(prompt)
            logprobs = writer.write_prompt(text, given.token_ids, known, options.logprobs)
        return {"text": text, "logprobs": logprobs}

    def _prompt_of_choice(self, prompt: int) -> Json:
        fields: Json = {}
        if self._options.token_ids:
            fields["prompt_token_ids"] = self._generation.prompts[prompt].token_ids
        if self._options.prompt_logprobs:
            fields["prompt_logprobs"] = prompt_logprobs(self._engine, self._generation.prompt_logprobs(prompt))
        return fields


class ChatFormat(Format):
    """/v1/chat/completions. A choice's first chunk has the role, its last one nothing but the finish reason."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(
        self,
        engine: Engine,
        generation: Generation,
        options: AnswerOptions,
        tools: ToolUse | None = None,
        documents: Callable[[Usage], Json] | None = None,
    ) -> None:
        """`documents` tells which documents were used, and what of them was reused."""
        super().__init__(engine, generation, options)
        self._documents = documents
        self._begun: set[int] = set()
        self._writer = ChatLogprobs(engine, tokens_as_ids=options.tokens_as_ids)
        self._tools = tools
        self._calls: dict[int, ToolCallWriter] = {}

    def _choice(self, choice: Choice) -> Json:
        calls = self._call_writer(choice.index)
        return {
            "index": choice.index,
            "message": {"role": "assistant", "refusal": None} | calls.message(choice.text),
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": calls.finish_reason(choice.finish_reason),
            **self._token_ids(choice.token_ids),
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
        calls, told = self._call_writer(index), self._token_ids(delta.token_ids)
        parts = list(calls.parts(delta.text, final=delta.finish_reason is not None))
        if not parts and (delta.logprobs or any(told.values())):
            parts.append({"content": ""})
        logprobs = self._logprobs(delta.logprobs)
        for part in parts:  # the first of them tells the delta's tokens
            yield self._chunk_choice(index, part, logprobs=logprobs) | told
            logprobs, told = None, self._token_ids(())
        if delta.finish_reason is not None:
            yield self._chunk_choice(index, {}, finish_reason=calls.finish_reason(delta.finish_reason))

    def _prompt_fields(self) -> Json:
        fields: Json = {}
        if self._options.token_ids:
            fields["prompt_token_ids"] = self._generation.prompts[0].token_ids
        if self._documents is not None:
            fields["rag"] = self._documents(self._generation.usage)
        if self._options.prompt_logprobs:
            fields["prompt_logprobs"] = prompt_logprobs(self._engine, self._generation.prompt_logprobs(0))
        return fields

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        return None if self._options.logprobs is None else self._writer.write(logprobs)

    def _chunk_choice(
        self, index: int, delta: Json, *, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
