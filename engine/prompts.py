"""Prompts: text and chats to token ids, and single tokens back to text.

Invariant: the same text gives the same tokens, from any thread; nothing that the caller passed is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stemcache.engine.errors import InvalidRequestError


class Prompts:
    """The tokenizer and chat template of one model; both may be missing, and then only token ids can be served."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    @property
    def backend(self) -> Tokenizer | None:
        """The tokenizers library's object. It keeps no state between calls, so any thread may use it."""
        return None if self._tokenizer is None else self._tokenizer.backend_tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises InvalidRequestError without a tokenizer."""
        if self.backend is None:
            raise InvalidRequestError("this model has no tokenizer: give the prompt as token ids", param="prompt")
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        documents: Sequence[Mapping[str, str]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation through the model's chat template.

        Raises InvalidRequestError when there is no template, it refuses the messages, or it has no place for documents
        or tools.
        """
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template: use completions instead", param="messages")
        if documents and not self._takes_documents:
            raise InvalidRequestError(
                "this model's chat template has no place for documents: put their text into a message",
                param="documents",
            )
        if tools and self.tool_template is None:
            raise InvalidRequestError(
                "this model's chat template has no place for tools: leave them out, or set 'tool_choice' to 'none'",
                param="tools",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=[dict(document) for document in documents] if documents else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise InvalidRequestError(f"the chat template refuses the messages: {error}", param="messages") from error
        return self.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special tokens shown; empty without a tokenizer."""
        return "" if self.backend is None else str(self.backend.decode(list(tokens), skip_special_tokens=False))

    def token_text(self, token: int) -> str:
        """The text of one token on its own; bytes that are no whole character show as replacement characters."""
        return "" if self.backend is None else str(self.backend.decode([token], skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, exact also where they are part of a character."""
        text = self.token_text(token)
        name = self.backend.id_to_token(token) if self.backend is not None else None
        if name is None or "\ufffd" not in text:
            return text.encode()
        if name.startswith("<0x") and name.endswith(">"):  # SentencePiece's byte fallback
            return bytes([int(name[3:-1], 16)])
        return bytes(self._byte_of[char] for char in name if char in self._byte_of)

    def is_special(self, text: str) -> bool:
        """Whether `text` is a special token, which is left out of generated text."""
        token = None if self.backend is None else self.backend.token_to_id(text)
        added = {} if self._tokenizer is None else self._tokenizer.added_tokens_decoder
        return token in added and bool(added[token].special)

    def special_ids(self, texts: Iterable[str | None]) -> frozenset[int]:
        """Ids of the given special tokens, those that exist."""
        if self.backend is None:
            return frozenset()
        ids = (self.backend.token_to_id(text) for text in texts if text)
        return frozenset(i for i in ids if i is not None)

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The printable characters that byte-level BPE writes for bytes (GPT-2)."""
        return {char: byte for byte, char in bytes_to_unicode().items()}

    @cached_property
    def _takes_documents(self) -> bool:
        assert self._tokenizer is not None
        return "documents" in _variables(self._tokenizer.get_chat_template())

    @cached_property
    def tool_template(self) -> str | None:
        """The chat template that shows tools to the model; None where there is none with a place for them."""
        if self._tokenizer is None or not self._tokenizer.chat_template:
            return None
        template = str(self._tokenizer.get_chat_template(tools=[{}]))  # some models have one of its own for tools
        return template if "tools" in _variables(template) else None


def _variables(template: str) -> set[str]:
    """What a chat template takes from outside."""
    return meta.find_undeclared_variables(jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template))
