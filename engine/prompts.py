"""Prompts: text and chats to token ids, and single tokens back to text.

Invariant: the same text gives the same tokens, from any thread; nothing that the caller passed is dropped in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypedDict, Unpack

import jinja2
from jinja2 import meta
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stemcache.engine.errors import InvalidRequestError


class TemplateOptions(TypedDict, total=False):
    """What may be said of a conversation to the chat template.

    tools: in OpenAI's form.
    add_generation_prompt: end where the model's answer begins; true unless given.
    continue_final_message: end in the middle of the last message, which the model then goes on with.
    template_kwargs: values for the template's own variables.
    """

    documents: Sequence[Mapping[str, str]] | None
    tools: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool
    continue_final_message: bool
    template_kwargs: Mapping[str, Any] | None


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
        add_special_tokens: bool = False,  # few templates leave them to the tokenizer
        **options: Unpack[TemplateOptions],
    ) -> list[int]:
        """Token ids of a conversation through the model's chat template. Raises as `render_chat` does."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=add_special_tokens)

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and the characters [start, stop) that each stands for. Raises as `encode` does."""
        if self.backend is None:
            raise InvalidRequestError("this model has no tokenizer: give the prompt as token ids", param="prompt")
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return list(encoding.ids), list(encoding.offsets)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer is not None and bool(self._tokenizer.chat_template)

    @property
    def takes_documents(self) -> bool:
        """Whether the chat template has a place for documents."""
        return self.has_chat_template and "documents" in self._template_variables

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[TemplateOptions]) -> str:
        """The text of a conversation through the model's chat template.

        Raises InvalidRequestError when there is no template, it refuses the messages, it has no place for documents or
        tools, or has no such variable.
        """
        documents, tools = options.get("documents"), options.get("tools")
        template_kwargs = options.get("template_kwargs") or {}
        if self._tokenizer is None or not self._tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template: use completions instead", param="messages")
        if documents and "documents" not in self._template_variables:
            raise InvalidRequestError(
                "this model's chat template has no place for documents: put their text into a message",
                param="documents",
            )
        if tools and self.tool_template is None:
            raise InvalidRequestError(
                "this model's chat template has no place for tools: leave them out, or set 'tool_choice' to 'none'",
                param="tools",
            )
        self._check_template_kwargs(template_kwargs)
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=[dict(document) for document in documents] if documents else None,
                add_generation_prompt=options.get("add_generation_prompt", True),
                continue_final_message=options.get("continue_final_message", False),
                tokenize=False,
                **template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
            raise InvalidRequestError(f"the chat template refuses the messages: {error}", param="messages") from error
        return str(text)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; empty without a tokenizer."""
        return (
            ""
            if self.backend is None
            else str(self.backend.decode(list(tokens), skip_special_tokens=skip_special_tokens))
        )

    def is_special(self, token: int) -> bool:
        """Whether a token is a mark, such as the end of the text, and not text itself."""
        return token in self._special

    def is_special_text(self, text: str) -> bool:
        """Whether `text` is written as one special token, which is left out of generated text unless asked for."""
        return self.backend is not None and self.backend.token_to_id(text) in self._special

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

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The printable characters that byte-level BPE writes for bytes (GPT-2)."""
        return {char: byte for byte, char in bytes_to_unicode().items()}

    @cached_property
    def _special(self) -> frozenset[int]:
        added = {} if self.backend is None else self.backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    def _check_template_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse names that the template does not read, and those of arguments that have a field of their own."""
        assert self._tokenizer is not None
        if not kwargs:  # the usual case, and reading a signature takes as long as rendering a template
            return
        reserved = {"messages", *inspect.signature(self._tokenizer.apply_chat_template).parameters}
        for name in kwargs:
            if name in reserved or name not in self._template_variables:
                raise InvalidRequestError(
                    f"the chat template has no variable {name!r} that a request may set",
                    param=f"chat_template_kwargs.{name}",
                    code="unsupported_parameter",
                )

    @cached_property
    def _template_variables(self) -> frozenset[str]:
        """The variables that the chat template reads and does not set itself."""
        assert self._tokenizer is not None
        return _variables(str(self._tokenizer.get_chat_template()))

    @cached_property
    def tool_template(self) -> str | None:
        """The chat template that shows tools to the model; None where there is none with a place for them."""
        if self._tokenizer is None or not self._tokenizer.chat_template:
            return None
        template = str(self._tokenizer.get_chat_template(tools=[{}]))  # some models have one of its own for tools
        return template if "tools" in _variables(template) else None


def _variables(template: str) -> frozenset[str]:
    """What a chat template takes from outside."""
    parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    return frozenset(meta.find_undeclared_variables(parsed))
