"""What no cache could beat: hit rates of caches that know the future.

Invariant: both are Belady's rule (evict what is needed latest, keep nothing that is needed later than all else), which
is optimal where all pieces have one size. They bound the hit rate of tokens. A rate of documents can in principle be
higher, by keeping short documents for long ones; it is shown because the other rows have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Final

from stemcache.prefixtree.tokens import encode_tokens
from stemcache.ragcache.simulate import GRAIN, HitRates, Prompts
from stemcache.ragcache.simulate_trace import Trace

NEVER: Final = 1 << 60


def belady(trace: Trace, *, capacity_tokens: int, chunk_tokens: int) -> HitRates:
    """Return the most that any eviction can hit, documents in the order of relevance.

    A chunk is one piece. What a prompt needs again it needs with all before it, so the rule never evicts a parent
    before its child, and its cache is one that a prefix tree could have.
    """
    prompts = Prompts(trace, chunk_tokens)
    capacity = capacity_tokens // chunk_tokens
    names: dict[tuple[int, bytes], int] = {}
    paths = [_path(_chunks(prompts, documents), names) for documents in trace.requests]
    following = _following(paths, len(names))
    cached: dict[int, int] = {}  # chunk -> when it is needed next
    latest: list[tuple[int, int]] = []  # (-when, -chunk): a child has a larger number than its parent and goes first
    rates = HitRates()
    for index, (path, documents) in enumerate(zip(paths, trace.requests, strict=True)):
        hits = next((at for at, chunk in enumerate(path) if chunk not in cached), len(path))
        sizes = [prompts.sizes[document] for document in documents]
        rates.count(sizes, len(prompts.system), hits * GRAIN, GRAIN)
        for chunk, when in zip(path, following[index], strict=True):
            if when == NEVER:
                cached.pop(chunk, None)
                continue
            cached[chunk] = when
            heappush(latest, (-when, -chunk))
        while len(cached) > capacity:
            when, chunk = heappop(latest)
            if cached.get(-chunk) == -when:
                del cached[-chunk]
    return rates


def order_free(trace: Trace, *, capacity_tokens: int, chunk_tokens: int) -> HitRates:
    """Return the most that any cache can hit which reuses a document wherever it stands, as no exact one can.

    So it bounds every order of documents, too. A made-up token of a document is one piece.
    """
    prompts = Prompts(trace, chunk_tokens)
    free = capacity_tokens // chunk_tokens * GRAIN  # the system prompt takes none of it: more than can be had
    following = _following(trace.requests, len(trace.lengths))
    cached: dict[int, int] = {}  # document -> its cached tokens
    when_needed: dict[int, int] = {}
    latest: list[tuple[int, int]] = []
    rates = HitRates()
    for index, documents in enumerate(trace.requests):
        for document, when in zip(documents, following[index], strict=True):
            size, found = prompts.sizes[document], cached.get(document, 0)
            rates.documents += 1
            rates.hit_documents += found == size
            rates.tokens += size
            rates.hit_tokens += found
            keep = size if when != NEVER else 0
            free -= keep - found
            cached[document], when_needed[document] = keep, when
            if keep:
                heappush(latest, (-when, document))
        while free < 0:
            when, document = latest[0]
            given = min(-free, cached.get(document, 0)) if when_needed[document] == -when else 0
            cached[document] -= given
            free += given
            if free < 0:
                heappop(latest)
    return rates


def _chunks(prompts: Prompts, documents: Sequence[int]) -> list[bytes]:
    """The whole chunks up to the end of the last document."""
    data = encode_tokens(prompts.of(documents))
    size = len(encode_tokens([0] * GRAIN))
    return [data[at : at + size] for at in range(0, len(data) - size + 1, size)]


def _path(chunks: Sequence[bytes], names: dict[tuple[int, bytes], int]) -> list[int]:
    """A number for each chunk together with all before it; `names` holds those given so far."""
    path, parent = [], -1
    for chunk in chunks:
        parent = names.setdefault((parent, chunk), len(names))
        path.append(parent)
    return path


def _following(visits: Sequence[Sequence[int]], n_names: int) -> list[list[int]]:
    """For each visit, when each of what it visits is visited next."""
    coming = [NEVER] * n_names
    result: list[list[int]] = [[] for _ in visits]
    for index in range(len(visits) - 1, -1, -1):
        result[index] = [coming[name] for name in visits[index]]
        for name in visits[index]:
            coming[name] = index
    return result
