"""Log-probabilities in OpenAI's two forms.

Invariant: every number is finite, as JSON has no infinity: what is impossible is reported as -9999.0, OpenAI's floor.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from stemcache.engine.outputs import TokenLogprob

if TYPE_CHECKING:
    from stemcache.engine.engine import Engine

Json = dict[str, Any]

FLOOR: Final = -9999.0


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)


def token_name(data: bytes) -> str:
    """A token as text; one that is only a part of a character as `bytes:\\xe2\\x80`, the form that OpenAI uses."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class CompletionLogprobs:
    """The `logprobs` of one text choice, a part at a time. `text_offset` counts characters from the choice's start."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def write(self, tokens: Iterable[TokenLogprob]) -> Json:
        """The four parallel lists for the next tokens. The chosen token is always among `top_logprobs`."""
        lists: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            data = self._engine.token_bytes(token.token_id)
            top: dict[str, float] = {}
            for other, logprob in (*token.top, (token.token_id, token.logprob)):
                top.setdefault(token_name(self._engine.token_bytes(other)), _finite(logprob))
            lists["tokens"].append(token_name(data))
            lists["token_logprobs"].append(_finite(token.logprob))
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(data))
        return lists


class ChatLogprobs:
    """The `logprobs` of chat choices."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def write(self, tokens: Iterable[TokenLogprob]) -> Json:
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(other, logprob) for other, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = self._engine.token_bytes(token_id)
        return {"token": token_name(data), "logprob": _finite(logprob), "bytes": list(data)}
