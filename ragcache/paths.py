"""Paths: in which orders documents were put into prompts lately, so that the order of the next prompt can follow one.

Invariant: a path only says that a prompt began so; how much of it is cached is asked of the cache itself, each time.
Bounded: the path that was not used for the longest time goes. Of a document that was deleted no token is kept.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

MAX_PATHS: Final = 4096

Keys = tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Prompt:
    """The tokens up to the end of the last document, and which documents these are."""

    tokens: array[int]
    keys: frozenset[int]


CachedOf = Callable[[Sequence[Sequence[int]]], list[int]]


class Paths:
    """Of documents (by their passages' keys) after a head, the tokens before them. From any thread."""

    def __init__(self, limit: int = MAX_PATHS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._tokens: OrderedDict[tuple[bytes, Keys], tuple[_Prompt, int]] = OrderedDict()
        self._next: dict[tuple[bytes, Keys], set[int]] = {}

    def remember(self, space: bytes, tokens: Sequence[int], keys: Sequence[int], stops: Sequence[int]) -> None:
        """A prompt was made with these documents, each of which ends at one of `stops`."""
        shared = _Prompt(array("I", tokens[: stops[-1]] if stops else []), frozenset(keys))
        with self._lock:
            for n, stop in enumerate(stops, start=1):
                path = (space, tuple(keys[:n]))
                self._tokens[path] = (shared, stop)
                self._tokens.move_to_end(path)
                self._next.setdefault((space, tuple(keys[: n - 1])), set()).add(keys[n - 1])
            while len(self._tokens) > self._limit:
                (gone, walked), _ = self._tokens.popitem(last=False)
                self._unlink(gone, walked)

    def forget(self, keys: Iterable[int]) -> None:
        """These documents are no more: nor is any prompt remembered that holds one. O(paths)."""
        gone = set(keys)
        with self._lock:
            for space, path in [each for each, (prompt, _) in self._tokens.items() if not gone.isdisjoint(prompt.keys)]:
                del self._tokens[space, path]
                self._unlink(space, path)

    def resident(self, space: bytes, head: Sequence[int], keys: Sequence[int], cached_of: CachedOf) -> dict[Keys, int]:
        """How many leading tokens are cached of each known path of some of these documents. One look at the cache."""
        with self._lock:
            found: list[Keys] = []
            walks: list[Keys] = [()]
            while walks:
                walked = walks.pop()
                going = self._next.get((space, walked), set()) & (set(keys) - set(walked))
                longer = [(*walked, key) for key in going if (space, (*walked, key)) in self._tokens]
                found += longer
                walks += longer
            prompts = [list(prompt.tokens[:stop]) for prompt, stop in (self._tokens[space, path] for path in found)]
        cached = cached_of([list(head), *prompts])
        return dict(zip([(), *found], cached, strict=True))

    def _unlink(self, space: bytes, walked: Keys) -> None:
        going = self._next.get((space, walked[:-1]))
        if going is not None:
            going.discard(walked[-1])
            if not going:
                del self._next[space, walked[:-1]]


def space_of(tenant: bytes, cache_salt: bytes, head: Sequence[int]) -> bytes:
    """What tells apart prompts that share nothing: whose they are, and what stands before the documents."""
    digest = hashlib.sha256()
    for part in (tenant, cache_salt, array("I", head).tobytes()):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
