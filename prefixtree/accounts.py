"""Accounts: what each namespace asked the store for, what it found, and what it lost.

Invariant: an account only counts up. How many are kept is bounded: clients may make up namespaces (cache salts), so the
account that was not needed for the longest time goes, and starts from zero when its namespace comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MAX_ACCOUNTS: Final = 4096


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
