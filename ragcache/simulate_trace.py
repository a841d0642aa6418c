"""Traces: which documents were asked for, one request after another.

Invariant: a trace holds no text. A document is a number and a length; equal numbers are equal documents.

Two forms of JSON lines are read, one request each:

    {"documents": [{"id": "a", "tokens": 812}, ...], "question_tokens": 40}    documents by relevance
    {"timestamp": 27, "input_length": 6755, "output_length": 500, "hash_ids": [46, 47, ...]}

The second is that of the Mooncake traces (arXiv 2407.00079): a hash id names 512 tokens together with all before them,
so its blocks cannot be put in another order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stemcache.prefixtree.errors import StemcacheError

MOONCAKE_BLOCK: Final = 512
QUESTION_TOKENS: Final = 100


class TraceError(StemcacheError):
    """A line of a trace cannot be read; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests, each a tuple of documents by relevance.

    Attributes:
        lengths: tokens of each document, by its number.
        questions: tokens after the documents, of each request; they are always new.
        system_tokens: before the documents; they are always the same.
        orderable: whether the documents of a request may stand in another order.
    """

    name: str
    lengths: Sequence[int]
    requests: Sequence[tuple[int, ...]]
    questions: Sequence[int]
    system_tokens: int
    orderable: bool


def read_trace(name: str, lines: Iterable[str], *, system_tokens: int = 0) -> Trace:
    """Read either form; blank lines are skipped. Raises TraceError."""
    numbers: dict[str | int, int] = {}
    lengths: list[int] = []
    requests: list[tuple[int, ...]] = []
    questions: list[int] = []
    forms: set[str] = set()
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            form = "hash_ids" if "hash_ids" in record else "documents"
            documents, question = _READERS[form](record)
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{name}, line {at}: {_reason(error)}; see docs/policies.md for the two forms") from error
        forms.add(form)
        for key, n_tokens in documents:
            if numbers.setdefault(key, len(lengths)) == len(lengths):
                lengths.append(n_tokens)
            elif lengths[numbers[key]] != n_tokens:
                raise TraceError(f"{name}, line {at}: document {key!r} has another length than before")
        requests.append(tuple(numbers[key] for key, _ in documents))
        questions.append(question)
    if not requests:
        raise TraceError(f"{name} holds no request")
    if len(forms) > 1:
        raise TraceError(f"{name} mixes documents and hash_ids")
    return Trace(name, lengths, requests, questions, system_tokens, orderable=forms == {"documents"})


def _read_documents(record: dict[str, Any]) -> tuple[list[tuple[str | int, int]], int]:
    documents = [(_key(each["id"]), _length(each["tokens"], 1)) for each in record["documents"]]
    if len({key for key, _ in documents}) != len(documents):
        raise ValueError("a document stands there twice")
    return documents, _length(record.get("question_tokens", QUESTION_TOKENS), 0)


def _read_mooncake(record: dict[str, Any]) -> tuple[list[tuple[str | int, int]], int]:
    """The last block may hold fewer tokens. It counts as whole, for its id is that of what is in it."""
    return [(_key(each), MOONCAKE_BLOCK) for each in record["hash_ids"]], 0


_READERS: Final[dict[str, Callable[[dict[str, Any]], tuple[list[tuple[str | int, int]], int]]]] = {
    "documents": _read_documents,
    "hash_ids": _read_mooncake,
}


def _key(value: object) -> str | int:
    if not isinstance(value, str | int):
        raise TypeError(f"an id must be a string or a whole number, not {value!r}")
    return value


def _length(value: object, smallest: int) -> int:
    if not isinstance(value, int) or value < smallest:
        raise TypeError(f"a number of tokens must be a whole number from {smallest} on, not {value!r}")
    return value


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
