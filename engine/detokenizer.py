"""From token ids to text, a token at a time.

Invariant: the text given out so far, joined, is a prefix of the final text, and never holds an unfinished character or
anything that might still turn out to be a stop string.

The bytes-to-text part is the tokenizers library's `DecodeStream`; what is ours is the holding back of stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from stemcache.engine.common_prefix import common_prefix

# Some decoders treat the first token of a text specially (SentencePiece strips its space), so decoding starts inside
# the prompt.
_PROMPT_TAIL = 8
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be given out now, and whether a stop string ended the sequence."""

    text: str
    stopped: bool


class Detokenizer:
    """The text of one generated sequence. Without a tokenizer all text is empty.

    include_stop: the text ends after the stop string, not before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop: Sequence[str],
        *,
        skip_special_tokens: bool = True,
        include_stop: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._include_stop = include_stop
        self._stop = tuple(stop)
        self._held = ""
        self._tail = list(prompt[-_PROMPT_TAIL:])
        self._tokens: list[int] = []
        self._stream = (
            DecodeStream(self._tail, skip_special_tokens=skip_special_tokens) if tokenizer is not None else None
        )
        self._before = self._decode(self._tail)
        self._decoded = len(self._before)
        # Such a prompt may end within a character, so the stream gives out the tail with the first piece of text.
        self._has_open_end = self._before.endswith(_REPLACEMENT)

    def add(self, token: int, *, may_stop: bool = True) -> Piece:
        """The text that `token` makes certain. Unless `may_stop`, a stop string that it completes is plain text."""
        if self._tokenizer is None or self._stream is None:
            return Piece("", False)
        self._tokens.append(token)
        text = self._stream.step(self._tokenizer, token) or ""
        if text and self._has_open_end:
            self._has_open_end, self._decoded = False, len(text)
            # From the character on that the prompt leaves unfinished, if it does.
            return self._release(text[common_prefix(self._before, text) :], may_stop)
        self._decoded += len(text)
        return self._release(text, may_stop)

    def finish(self) -> Piece:
        """What is left when the sequence ends: unfinished bytes as replacement characters, and held-back text."""
        piece = self._release(self._unfinished())
        if piece.stopped:
            return piece
        text, self._held = piece.text + self._held, ""
        return Piece(text, False)

    def _unfinished(self) -> str:
        """Text that the stream still withholds because its last character is not complete."""
        return self._decode(self._tail + self._tokens)[self._decoded :]

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special)

    def _release(self, text: str, may_stop: bool = True) -> Piece:
        self._held += text
        found = [(at, stop) for at, stop in ((self._held.find(stop), stop) for stop in self._stop) if at >= 0]
        if found and may_stop:
            at, stop = min(found)
            text, self._held = self._held[: at + (len(stop) if self._include_stop else 0)], ""
            return Piece(text, True)
        keep = self._possible_stop()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return Piece(text, False)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
