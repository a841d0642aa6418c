"""The splitter: documents to passages that are short enough to be retrieved and put into a prompt.

Invariant: no passage has more than the given number of the model's tokens, and no text is lost but white space between
passages. Cuts are made at the largest border that fits: sections, paragraphs, sentences, words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stemcache.engine.errors import InvalidRequestError
from stemcache.ragcache.errors import MissingExtraError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Splitter:
    """Splits texts into passages of up to `max_tokens` tokens of a tokenizer; None leaves them whole.

    Raises InvalidRequestError for a number under 8, MissingExtraError.
    """

    def __init__(self, tokenizer: Tokenizer | None, max_tokens: int | None) -> None:
        if max_tokens is not None and max_tokens < 8:
            raise InvalidRequestError(f"passages need room for 8 tokens at least, not {max_tokens}")
        self.max_tokens = max_tokens
        self._splitter = None
        if max_tokens is not None:
            try:
                from semantic_text_splitter import TextSplitter
            except ImportError:
                raise MissingExtraError("semantic-text-splitter", "rag") from None
            if tokenizer is None:
                raise InvalidRequestError("this model has no tokenizer, so it cannot read documents")
            self._splitter = TextSplitter.from_huggingface_tokenizer(tokenizer, max_tokens)

    def split(self, text: str) -> list[str]:
        """The passages of a text, in order; the text itself where it is short enough."""
        return [text] if self._splitter is None else list(self._splitter.chunks(text))
