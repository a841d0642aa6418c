"""From a request's prompt to token ids, off the event loop where that takes long.

Invariant: a prompt's token ids are decided here and nowhere else, so `/tokenize` says what a completion will read, and
`/v1/cache/explain` explains it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stemcache.api.generation import Prompt
from stemcache.engine.errors import InvalidRequestError
from stemcache.ragcache.compose import Template

if TYPE_CHECKING:
    from stemcache.api.messages import Message, TemplateFields
    from stemcache.api.schemas import ChatRequest, CompletionRequest
    from stemcache.engine.engine import Engine

Tools = Sequence[dict[str, Any]] | None

# Tokenising some kilobytes takes less time than the way to another thread and back.
_LONG_TEXT = 8192


async def completion_prompts(engine: Engine, body: CompletionRequest) -> list[Prompt]:
    """The prompts of a text completion. Raises InvalidRequestError."""
    prompts = [
        Prompt(await encode_text(engine, prompt, add_special_tokens=body.add_special_tokens), prompt)
        if isinstance(prompt, str)
        else Prompt(prompt)
        for prompt in body.prompt
    ]
    return [_truncated(prompt, body.truncate_prompt_tokens) for prompt in prompts]


async def chat_prompt(engine: Engine, body: ChatRequest, tools: Tools) -> Prompt:
    """The prompt of a chat completion; `tools` as the chat template takes them. Raises InvalidRequestError."""
    return _truncated(
        Prompt(await encode_messages(engine, body.messages, body, tools=tools)), body.truncate_prompt_tokens
    )


async def encode_text(engine: Engine, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a plain prompt. Raises InvalidRequestError."""
    return await _maybe_in_thread(len(text), lambda: engine.encode(text, add_special_tokens))


async def encode_messages(
    engine: Engine, messages: Sequence[Message], fields: TemplateFields, *, tools: Tools = None
) -> list[int]:
    """Token ids of a conversation, by the model's chat template. Raises InvalidRequestError."""
    rendered = [message.for_template() for message in messages]
    documents = None if fields.documents is None else [document.model_dump() for document in fields.documents]
    template = template_fields(fields, tools)
    parts = (*rendered, *(documents or ()), *(tools or ()))
    length = sum(len(str(value)) for part in parts for value in part.values())
    return await _maybe_in_thread(
        length,
        lambda: engine.encode_chat(
            rendered,
            documents=documents,
            tools=tools,
            add_generation_prompt=template.add_generation_prompt,
            continue_final_message=template.continue_final_message,
            add_special_tokens=template.add_special_tokens,
            template_kwargs=template.template_kwargs,
        ),
    )


def template_fields(fields: TemplateFields, tools: Tools) -> Template:
    """What a request says of the chat template. Raises InvalidRequestError."""
    if fields.continue_final_message and fields.add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.", param="continue_final_message"
        )
    return Template(
        tools=tools,
        add_generation_prompt=fields.add_generation_prompt is not False and not fields.continue_final_message,
        continue_final_message=fields.continue_final_message,
        add_special_tokens=bool(fields.add_special_tokens),
        template_kwargs=fields.template_kwargs,
    )


def _truncated(prompt: Prompt, limit: int | None) -> Prompt:
    """A prompt's last `limit` tokens, as vLLM's `truncate_prompt_tokens` keeps them. Raises InvalidRequestError."""
    if limit is None:
        return prompt
    if limit < 1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be at least 1; got {limit}", param="truncate_prompt_tokens"
        )
    return prompt if len(prompt.token_ids) <= limit else Prompt(prompt.token_ids[-limit:])


async def _maybe_in_thread(length: int, work: Callable[[], list[int]]) -> list[int]:
    return work() if length < _LONG_TEXT else await asyncio.to_thread(work)
