"""Log-probabilities in OpenAI's two forms.

Invariant: every number is finite, as JSON has no infinity: what is impossible is reported as -9999.0, OpenAI's floor.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
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
    """The `logprobs` of one text choice, a part at a time. `text_offset` counts characters from the choice's start.

    tokens_as_ids: name tokens by their ids, as vLLM's `return_tokens_as_token_ids` does.
    special_hidden: special tokens are not part of the text, so the offset does not move past them.
    """

    def __init__(self, engine: Engine, *, tokens_as_ids: bool = False, special_hidden: bool = True) -> None:
        self._engine = engine
        self._tokens_as_ids = tokens_as_ids
        self._special_hidden = special_hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def write(self, tokens: Iterable[TokenLogprob]) -> Json:
        """The four parallel lists for the next tokens. The chosen token is always among `top_logprobs`."""
        lists = _no_logprobs()
        for token in tokens:
            self._add(lists, token.token_id, token, len(token.top))
        return lists

    def write_prompt(
        self, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], alternatives: int
    ) -> Json:
        """The lists for the echoed prompt, which reads `text`. The first token has no log-probability."""
        lists = _no_logprobs()
        for token, logprob in zip(tokens, logprobs, strict=True):
            # A prompt that was text shows the special tokens that were written in it, not those that were added.
            shown = text.startswith(self._engine.prompts.token_text(token), self._offset)
            self._add(lists, token, logprob, alternatives, shown=shown)
        self._decoder.reset()
        self._offset = len(text)
        return lists

    def _add(
        self, lists: Json, token: int, logprob: TokenLogprob | None, alternatives: int, *, shown: bool = False
    ) -> None:
        lists["tokens"].append(self._name(token))
        lists["token_logprobs"].append(logprob and _finite(logprob.logprob))
        lists["top_logprobs"].append(logprob and self._top(logprob, alternatives))
        lists["text_offset"].append(self._offset)
        if shown or not (self._special_hidden and self._engine.prompts.is_special(token)):
            self._offset += len(self._decoder.decode(self._engine.prompts.token_bytes(token)))

    def _top(self, token: TokenLogprob, alternatives: int) -> dict[str, float]:
        top: dict[str, float] = {}
        for other, logprob in (*token.top[:alternatives], (token.token_id, token.logprob)):
            top.setdefault(self._name(other), _finite(logprob))
        return top

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._tokens_as_ids else token_name(self._engine.prompts.token_bytes(token))


def _no_logprobs() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class ChatLogprobs:
    """The `logprobs` of chat choices."""

    def __init__(self, engine: Engine, *, tokens_as_ids: bool = False) -> None:
        self._engine = engine
        self._tokens_as_ids = tokens_as_ids

    def write(self, tokens: Iterable[TokenLogprob]) -> Json:
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(other, logprob) for other, logprob in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        data = self._engine.prompts.token_bytes(token_id)
        name = f"token_id:{token_id}" if self._tokens_as_ids else token_name(data)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(data)}


def prompt_logprobs(engine: Engine, logprobs: Iterable[TokenLogprob | None]) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: for each token of the prompt its own and the likeliest tokens, by id."""

    def entry(token: int, logprob: float, rank: int | None) -> Json:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": engine.prompts.token_text(token)}

    def both(token: TokenLogprob) -> Json:
        top = {str(other): entry(other, logprob, rank) for rank, (other, logprob) in enumerate(token.top, start=1)}
        return {str(token.token_id): entry(token.token_id, token.logprob, token.rank), **top}

    return [None if token is None else both(token) for token in logprobs]
