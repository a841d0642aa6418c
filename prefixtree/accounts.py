"""Accounts: what each namespace asked the store for, what it found, and what it lost.

Invariant: every prompt that was used counts once, however often it was looked up before it could start. How many
accounts are kept is bounded: clients may make up namespaces (cache salts), so the account that was not needed for the
longest time goes, and starts from zero when its namespace comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MAX_ACCOUNTS: Final = 4096


@dataclass(frozen=True, slots=True)
class Lookup:
    """What one prompt found. Every token that was looked up is in exactly one of the counts; see `Account`."""

    hits: int
    evicted: int
    unfinished: int
    new: int

    @classmethod
    def of(cls, tokens: int, hits: int, known_chunks: int, chunk_tokens: int) -> Lookup:
        """known_chunks: the leading chunks that are cached, or were and have been evicted."""
        whole = tokens - tokens % chunk_tokens
        known = max(hits, known_chunks * chunk_tokens)
        return cls(hits, known - hits, tokens - max(whole, hits), max(0, whole - known))

    @property
    def misses(self) -> int:
        return self.evicted + self.unfinished + self.new


@dataclass(slots=True)
class Account:
    """Tokens and chunks of one namespace, since its account was opened.

    Every token that was acquired is in exactly one of the four token counts.

    Attributes:
        acquires: prompts that were looked up.
        hit_tokens: were cached.
        evicted_tokens: missed; in chunks that were cached after this very prefix once, and were evicted.
        unfinished_tokens: missed; at the prompt's end, less than a chunk, which is never cached on its own.
        new_tokens: missed; never cached after this prefix, as far as the store remembers. (`explain` tells apart what
            is new altogether and what is cached at another place. Here that would cost a search for every request.)
        evicted_chunks: chunks that it lost, by eviction or by being cleared.
    """

    acquires: int = 0
    hit_tokens: int = 0
    evicted_tokens: int = 0
    unfinished_tokens: int = 0
    new_tokens: int = 0
    evicted_chunks: int = 0

    def count(self, lookup: Lookup, times: int = 1) -> None:
        """Enter a prompt; or take it out again, with `times` -1."""
        self.acquires += times
        self.hit_tokens += times * lookup.hits
        self.evicted_tokens += times * lookup.evicted
        self.unfinished_tokens += times * lookup.unfinished
        self.new_tokens += times * lookup.new


class Accounts:
    """One account per namespace digest, the `limit` most recently needed ones."""

    def __init__(self, limit: int = MAX_ACCOUNTS) -> None:
        self._limit = limit
        self._accounts: OrderedDict[bytes, Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def of(self, namespace: bytes) -> Account:
        """Return a namespace's account, opened if there is none. O(1)."""
        account = self._accounts.get(namespace)
        if account is None:
            account = self._accounts[namespace] = Account()
            if len(self._accounts) > self._limit:
                self._accounts.popitem(last=False)
        else:
            self._accounts.move_to_end(namespace)
        return account
