"""What a conversation's next turn will find in the cache.

The engine has cached an answer as the tokens that it generated. The next turn brings the answer back as text, and the
chat template and the tokenizer may spell it otherwise: the same words in other tokens, spaces stripped, an earlier
answer's reasoning left out. Then the cache would end where the spelling differs. So when an answer is complete, the
engine reads the conversation once more as the next turn will spell it, as far as it is not cached in that spelling.

Invariant: answers do not change. The next turn's prompt is what the template makes of its messages, whether or not it
was read before. Rejected: putting the generated tokens into that prompt, which would make an answer depend on what
the server remembers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from stemcache.api.encoding import encode_messages
from stemcache.api.generation import Choice, Generation
from stemcache.api.messages import Message
from stemcache.api.schemas import ChatRequest
from stemcache.api.tool_calls import ToolCallWriter
from stemcache.api.tools import ToolUse
from stemcache.engine.common_prefix import common_prefix
from stemcache.engine.errors import EngineError

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine

log = logging.getLogger(__name__)

# What the user says next is not known; the prompt up to it is what two different questions have in common.
_NEXT_QUESTIONS = ("The next", '"1')


async def read_as_next_turn(
    engine: Engine, body: ChatRequest, tools: ToolUse, generation: Generation, answer: Choice
) -> None:
    """Have the engine read the conversation with `answer` as its next turn will spell it, unless it is cached so.

    An answer that calls tools is left as it is: it is written in the template's own form, and what comes next, the
    tools' results, is not known.
    """
    if "tool_calls" in ToolCallWriter(tools.parser()).message(answer.text):
        return
    try:
        wanted = await _next_prefix(engine, body, tools, answer.text)
        if _full_chunks(engine, len(wanted)) > _full_chunks(engine, _cached_tokens(wanted, generation, answer)):
            generation.read(wanted[: _full_chunks(engine, len(wanted)) * engine.chunk_tokens])
    except EngineError as error:  # the template takes no further turn, the context is full, the engine is closed
        log.debug("the next turn is not prepared: %s", error)


async def _next_prefix(engine: Engine, body: ChatRequest, tools: ToolUse, answer: str) -> list[int]:
    """The tokens with which every next turn's prompt begins. Raises InvalidRequestError."""
    spoken = [*body.messages, Message.model_validate({"role": "assistant", "content": answer})]
    first, second = [
        await encode_messages(
            engine,
            [*spoken, Message.model_validate({"role": "user", "content": question})],
            body,
            tools=tools.offered,
        )
        for question in _NEXT_QUESTIONS
    ]
    return first[: common_prefix(first, second)]


def _cached_tokens(wanted: list[int], generation: Generation, answer: Choice) -> int:
    """How much of `wanted` was computed for the answer; its last token never was, for nothing followed it."""
    return common_prefix(wanted, [*generation.prompts[answer.prompt].token_ids, *answer.token_ids[:-1]])


def _full_chunks(engine: Engine, tokens: int) -> int:
    return tokens // engine.chunk_tokens
