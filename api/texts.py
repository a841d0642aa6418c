"""Text in requests, JSON within it, and the four forms of a completion's prompt.

Invariant: every text that gets past here can be encoded as UTF-8.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no text: better said here than by the tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, it holds half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def json_object(text: str) -> dict[str, Any]:
    """The JSON object that a field holds as text. Raises ValueError, which says what it is instead."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return parsed


def _parse_prompts(value: Any) -> list[str] | list[list[int]]:
    """The four forms of `prompt` as a list of prompts.

    By hand, as pydantic would try each of the four forms on each element and report the failures of all of them.
    """
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _is_token_ids(value)) else value
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")
    if all(isinstance(prompt, str) for prompt in prompts):
        return [_encodable(prompt) for prompt in prompts]
    if all(isinstance(prompt, list) and _is_token_ids(prompt) for prompt in prompts):
        return prompts
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")


def _is_token_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(token) is int for token in value)


Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_parse_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
