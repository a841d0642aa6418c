"""Reuse: what prompts found of each document in the cache, and what is cached of it now.

Invariant: every token of a document that stood in a prompt which was read is counted once: as a hit, as moved, or as a
miss by its reason, as `prefixtree.accounts` has them. Bounded: what was not used for the longest time goes.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Final

from stemcache.engine.cache import Cache
from stemcache.engine.outputs import Usage
from stemcache.prefixtree.footprint import Footprint
from stemcache.ragcache.documents import Passage
from stemcache.ragcache.preparation import Prepared, Space

MAX_DOCUMENTS: Final = 4096
MAX_PLACES: Final = 2048


@dataclass(frozen=True, slots=True)
class DocumentReuse:
    """One document.

    Attributes:
        tokens: of its passages that were read, each once.
        requests: prompts in which it stood.
        hit_tokens: of it were cached when those prompts came.
        moved_tokens: of it were moved there from another place, which is not exact (`reuse="blend"`).
        evicted_tokens: missed; had been cached at this place, and were evicted.
        unfinished_tokens: missed; at the prompt's end, less than a chunk.
        new_tokens: missed; never cached after what stood before them.
        cached_tokens: in the device's pool now, at all the places where it was read lately.
    """

    document_id: str
    title: str
    tokens: int
    requests: int
    hit_tokens: int
    moved_tokens: int
    evicted_tokens: int
    unfinished_tokens: int
    new_tokens: int
    cached_tokens: int

    @property
    def miss_tokens(self) -> int:
        return self.evicted_tokens + self.unfinished_tokens + self.new_tokens


@dataclass(slots=True)
class _Counts:
    """Of one document. `sizes`: tokens of its passages, by their keys; of the version `version`."""

    title: str = ""
    version: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    requests: int = 0
    hits: int = 0
    moved: int = 0
    evicted: int = 0
    unfinished: int = 0
    new: int = 0


@dataclass(frozen=True, slots=True)
class _Place:
    """The tokens [start, stop) of a prompt: where a passage was read. `holds`: the documents of the whole prompt."""

    prompt: array[int]
    holds: frozenset[str]
    start: int
    stop: int


Name = tuple[str, bytes, str]  # owner, cache salt, document


def _name(space: Space, passage: Passage) -> Name:
    return space.owner, space.cache_salt, passage.document_id


class Reuse:
    """Counts by document, of every owner and salt apart. From any thread."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._counts: OrderedDict[Name, _Counts] = OrderedDict()
        self._places: OrderedDict[tuple[Name, Footprint], _Place] = OrderedDict()

    def count(self, prepared: Prepared, usage: Usage) -> None:
        """A prepared prompt has been read; `usage` says what of it was found."""
        known = [
            (each.passage, span)
            for each, span in zip(prepared.retrieved, prepared.context.spans, strict=True)
            if each.passage.key > 0
        ]
        places = self._places_of(prepared, [span for _, span in known])
        seen = set()
        with self._lock:
            for passage, (start, stop) in known:
                name = _name(prepared.space, passage)
                counts = self._counts_of(name, passage)
                counts.requests += name not in seen
                seen.add(name)
                counts.sizes[passage.key] = stop - start
                _add(counts, start, stop, usage, self._cache.chunk_tokens)
            # The marks of what was moved follow those of what stands in the prompt, in the same order.
            names = [_name(prepared.space, passage) for passage, _ in known] * 2
            for name, (_, mark), place in zip(names, prepared.all_marks, places, strict=False):
                self._places[name, mark] = place
                self._places.move_to_end((name, mark))
            while len(self._places) > MAX_PLACES:
                self._places.popitem(last=False)

    def _places_of(self, prepared: Prepared, spans: Sequence[tuple[int, int]]) -> list[_Place]:
        """Where its passages were read: in the prompt, and alone where they may be moved from there."""
        prompt = array("I", prepared.tokens[: spans[-1][1]] if spans else [])
        holds = frozenset(each.passage.document_id for each in prepared.retrieved)
        places = [_Place(prompt, holds, start, stop) for start, stop in spans]
        blend = prepared.blend
        if blend is not None:
            for each, (start, stop) in zip(prepared.retrieved, blend.passages, strict=True):
                if each.passage.key > 0:
                    alone = array("I", blend.alone(prepared.tokens, (start, stop), self._cache.chunk_tokens))
                    only = frozenset([each.passage.document_id])
                    places.append(_Place(alone, only, blend.head, blend.head + stop - start))
        return places

    def of(self, space: Space, limit: int) -> list[DocumentReuse]:
        """The owner's documents under this salt, the latest used first. Waits for the engine's running step."""
        with self._lock:
            own = (name for name in reversed(self._counts) if name[:2] == (space.owner, space.cache_salt))
            found = {name: self._counts[name] for name in islice(own, limit)}
            places = [(name, place) for (name, _), place in self._places.items() if name in found]
        cached = self._cached(places, space)
        return [
            DocumentReuse(
                document_id=name[2],
                title=counts.title,
                tokens=sum(counts.sizes.values()),
                requests=counts.requests,
                hit_tokens=counts.hits,
                moved_tokens=counts.moved,
                evicted_tokens=counts.evicted,
                unfinished_tokens=counts.unfinished,
                new_tokens=counts.new,
                cached_tokens=cached[name],
            )
            for name, counts in found.items()
        ]

    def forget(self, owner: str, document_id: str, *, is_deleted: bool) -> None:
        """The document's content is no more; without `is_deleted` it has another now, and its counts go on."""
        with self._lock:
            if is_deleted:
                for name in [each for each in self._counts if (each[0], each[2]) == (owner, document_id)]:
                    del self._counts[name]
            # Every prompt that holds its tokens: they were to be forgotten.
            self._drop_places(lambda at, place: at[0] == owner and document_id in place.holds)

    def _counts_of(self, name: Name, passage: Passage) -> _Counts:
        counts = self._counts.setdefault(name, _Counts())
        self._counts.move_to_end(name)
        if len(self._counts) > MAX_DOCUMENTS:
            oldest, _ = self._counts.popitem(last=False)
            self._drop_places(lambda at, place: at == oldest)
        counts.title = passage.title
        if counts.version != passage.version:  # nothing of its earlier content is cached any more
            counts.version, counts.sizes = passage.version, {}
        return counts

    def _drop_places(self, match: Callable[[Name, _Place], bool]) -> None:
        for key in [key for key, place in self._places.items() if match(key[0], place)]:
            del self._places[key]

    def _cached(self, places: list[tuple[Name, _Place]], space: Space) -> defaultdict[Name, int]:
        """How many tokens of each document are cached. One look at the cache for each prompt, not for each document."""
        ends: dict[int, _Place] = {}
        for _, place in places:
            longest = ends.setdefault(id(place.prompt), place)
            if place.stop > longest.stop:
                ends[id(place.prompt)] = place
        found: dict[int, int] = {}
        if ends:
            prompts = [place.prompt[: place.stop] for place in ends.values()]
            leading = self._cache.cached_of(prompts, tenant=space.tenant, cache_salt=space.cache_salt)
            found = dict(zip(ends, leading, strict=True))
        cached: defaultdict[Name, int] = defaultdict(int)
        for name, place in places:
            cached[name] += max(0, min(place.stop, found[id(place.prompt)]) - place.start)
        return cached


def _add(counts: _Counts, start: int, stop: int, usage: Usage, chunk_tokens: int) -> None:
    """Count the tokens [start, stop) of a prompt: cached ones lead, then the evicted, the new, and an unfinished chunk.

    The prompt's last token is not looked up. What was moved lies behind the cached ones, and the rest of such a passage
    is computed whatever is cached.
    """
    looked_up = usage.prompt_tokens - 1
    gone = usage.cached_tokens + usage.evicted_tokens
    whole = max(gone, looked_up - looked_up % chunk_tokens)
    borders = [min(stop, max(start, at)) for at in (0, usage.cached_tokens, gone, whole, stop)]
    hits, evicted, new, unfinished = (right - left for left, right in pairwise(borders))
    moved = sum(len(part.kept) for part in usage.moved if start <= part.start < stop)
    if moved:
        evicted, new, unfinished = 0, stop - start - hits - moved, 0
    counts.hits += hits
    counts.moved += moved
    counts.evicted += evicted
    counts.new += new
    counts.unfinished += unfinished
