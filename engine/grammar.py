"""Grammars: what a generated text has to follow, and how far a choice has followed it.

Invariant: a compiled grammar is never advanced; each choice follows a copy of its own, which moves by chosen tokens
only. So preemption, which computes keys and values again but chooses nothing, does not touch it.

The grammars and their token masks are llguidance's; ours is what may end a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Final

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stemcache.engine.errors import GrammarError, InvalidRequestError

MAX_SOURCE_CHARACTERS: Final = 1 << 17
_CACHED_GRAMMARS = 64

# One space, or a line break with its indentation: what printed JSON has. Without a bound a model that is unsure writes
# white space until its tokens are used up.
JSON_WHITESPACE: Final = r"\x20|\x0A(\x20{0,40}|\x09{0,10})"
JSON_OPTIONS: Final = {"whitespace_pattern": JSON_WHITESPACE}

_LIMITS = LLParserLimits(verbose_errors=False)  # verbose ones quote what was generated


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text has to follow. Make one with the class methods; errors in it are found when a request has it.

    source: the grammar in llguidance's serialised form.
    param: the name of the request's field that it came from, for error messages.
    """

    source: str
    param: str = field(default="grammar", compare=False)

    @classmethod
    def json_object(cls, *, param: str = "grammar") -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, param=param)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any], *, param: str = "grammar") -> Grammar:
        """JSON that conforms to a schema (draft 2020-12). Raises InvalidRequestError."""
        return cls(LLMatcher.grammar_from_json_schema(schema_text(schema, param)), param)

    @classmethod
    def regex(cls, pattern: str, *, param: str = "grammar") -> Grammar:
        """A text that matches a regular expression (Rust's syntax) as a whole."""
        return cls(LLMatcher.grammar_from_regex(pattern), param)

    @classmethod
    def choice(cls, choices: Sequence[str], *, param: str = "grammar") -> Grammar:
        """One of several texts."""
        return cls.lark("start: " + " | ".join(json.dumps(choice) for choice in choices), param=param)

    @classmethod
    def lark(cls, text: str, *, param: str = "grammar") -> Grammar:
        """A context-free grammar in llguidance's variant of Lark's syntax, or in GBNF. Raises InvalidRequestError."""
        try:
            return cls(grammar_from("grammar", text), param)
        except ValueError as error:
            raise _refusal(str(error), param) from None


def schema_text(schema: Mapping[str, Any], param: str) -> str:
    """A JSON schema as llguidance is to read it. Raises InvalidRequestError."""
    if "x-guidance" in schema:
        raise InvalidRequestError("the schema must not set 'x-guidance'", param=param)
    try:
        return json.dumps({"x-guidance": JSON_OPTIONS} | dict(schema))
    except RecursionError:
        raise InvalidRequestError("the schema is nested too deeply", param=param) from None
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the schema is not JSON: {error}", param=param) from None


class GrammarCompiler:
    """Compiles grammars for one model's tokens, and keeps the last ones; any thread may use it.

    vocab_size: width of the logits, which may exceed the tokenizer's vocabulary. eos: end-of-sequence tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos: Iterable[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = frozenset(eos)
        self.compile = lru_cache(_CACHED_GRAMMARS)(self._compile)
        """The compiled form of a grammar. Raises InvalidRequestError when it cannot be followed."""

    @cached_property
    def tokenizer(self) -> LLTokenizer:
        """Made on first use: it takes about a second for a vocabulary of 128,000."""
        if self._hf_tokenizer is None:
            raise InvalidRequestError("this model has no tokenizer, so its output cannot follow a grammar")
        n_vocab = max(self._vocab_size, len(self._hf_tokenizer))
        try:
            return llguidance.hf.from_tokenizer(self._hf_tokenizer, n_vocab, sorted(self._eos) or None)
        except ValueError as error:
            raise InvalidRequestError(f"this model's tokenizer cannot be used with a grammar: {error}") from error

    def literal(self, text: str) -> str:
        """`text` in a Lark grammar: its token where the model has one of its own for it, else a string."""
        return f"<[{self._own_tokens[text]}]>" if text in self._own_tokens else json.dumps(text)

    def shown_tokens(self, *, but: str) -> str:
        """The tokens of their own that show in a text, such as `<think>`, in a Lark grammar; "" if there are none.

        Without the one named `but`.
        """
        added = {} if self._hf_tokenizer is None else self._hf_tokenizer.added_tokens_decoder
        shown = [i for text, i in self._own_tokens.items() if text != but and not added[i].special]
        return f"<[{','.join(map(str, shown))}]>" if shown else ""

    @cached_property
    def _own_tokens(self) -> dict[str, int]:
        """Added tokens that are no part of a grammar's strings: special ones, and all between `<` and `>`."""
        added = {} if self._hf_tokenizer is None else self._hf_tokenizer.added_tokens_decoder
        return {token.content: i for i, token in sorted(added.items()) if self.tokenizer.is_special_token(i)}

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        if len(grammar.source) > MAX_SOURCE_CHARACTERS:
            raise _refusal(f"it has {len(grammar.source)} characters of at most {MAX_SOURCE_CHARACTERS}", grammar.param)
        try:
            tokenizer = self.tokenizer
        except InvalidRequestError as error:
            error.param = grammar.param
            raise
        matcher = LLMatcher(tokenizer, grammar.source, log_level=0, limits=_LIMITS)
        enders = frozenset(tokenizer.eos_tokens)
        first = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little").nonzero()[0]
        # {"$ref": "#"} is found to lead nowhere only when its first mask is asked for.
        if "NoExtension" in matcher.get_error() or (not matcher.is_error() and enders.issuperset(first.tolist())):
            raise _refusal("it allows no text at all", grammar.param)
        if matcher.is_error():
            raise _refusal(matcher.get_error(), grammar.param)
        return CompiledGrammar(matcher, self._vocab_size, self._eos, enders)


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar over one model's tokens. Made by `GrammarCompiler.compile`."""

    matcher: LLMatcher
    vocab_size: int
    eos: frozenset[int]
    enders: frozenset[int]
    """What the matcher takes for ends of text; `eos`, or a stand-in where the model has none."""

    def start(self, *, stop_token_ids: Iterable[int] = (), ignore_eos: bool = False) -> GrammarMatcher:
        """A matcher at the start of a text that the given tokens may end."""
        ends = frozenset(stop_token_ids) | (frozenset() if ignore_eos else self.eos)
        return GrammarMatcher(self.matcher.deep_copy(), self.vocab_size, ends, self.enders)


class GrammarMatcher:
    """How far one choice has followed its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: frozenset[int], enders: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._is_end = ends
        self._ends = torch.tensor(sorted(ends), dtype=torch.long)
        self._enders = torch.tensor([i for i in sorted(enders) if i < vocab_size], dtype=torch.long)

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing may follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool[vocabulary]. Raises GrammarError when none may, or a limit is met.

        Tokens that end the text are among them exactly where the text is whole. (A stop token that is also the only way
        on is allowed: it ends the text early, as the caller asked.)
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed any further: {one_line(self._matcher.get_error())}")
        allowed = torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_))
        allowed[self._enders] = False
        if self._matcher.is_accepting():
            allowed[self._ends] = True
        elif len(self._ends):
            without_ends = allowed.clone()
            without_ends[self._ends] = False
            allowed = without_ends if bool(without_ends.any()) else allowed
        if not bool(allowed.any()):
            raise GrammarError("the grammar cannot be followed any further: the model has no token for what must come")
        return allowed

    def advance(self, token: int) -> None:
        """Record a chosen token. Raises GrammarError."""
        if token not in self._is_end and not self._matcher.consume_token(token):
            raise GrammarError(f"the grammar cannot be followed any further: {one_line(self._matcher.get_error())}")


def one_line(error: str) -> str:
    """llguidance's errors quote the grammar in further lines; here they are part of a sentence."""
    text = " ".join(error.replace("<non-verbose/>", "").split()).rstrip(".")
    return text if len(text) <= 300 else text[:300] + " ..."


def _refusal(reason: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(f"the output cannot be made to follow this: {one_line(reason)}", param=param)
