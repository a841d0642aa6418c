"""What lies only below, against plain dictionaries: what is remembered, and what a snapshot draws of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from stemcache.prefixtree.below import ChunksBelow
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.runs import group_begin
from stemcache.prefixtree.snapshot import TreeSnapshot
from stemcache.prefixtree.store import PrefixStore
from stemcache.prefixtree.tokens import decode_tokens

CHUNK = 2
GROUP = 4
SPACES = [Namespace.of(model="m", dtype="float32", tenant=tenant) for tenant in ("a", "b")]

Path = tuple[int, ...]  # tokens, whole chunks
Place = tuple[int, Path]  # (index of the namespace, path)


def path_of(node: Node) -> Place:
    keys = [decode_tokens(each.key) for each in node.upward()]
    space = next(i for i, each in enumerate(SPACES) if each.digest == node.root.key)
    return space, tuple(token for key in reversed(keys) for token in key)


class SomeTier:
    """A watcher that hands some of the evicted chunks to a tier, and remembers which in a plain set."""

    def __init__(self, rng: random.Random, limit: int, share: float = 0.8) -> None:
        self.rng, self.share = rng, share
        self.below = ChunksBelow(limit)
        self.handed: dict[Place, bool] = {}  # the latest evicted last; whether it was named
        self.digests: dict[Place, bytes] = {}
        self.limit = limit

    def published(self, node: Node) -> None: ...
    def used(self, node: Node) -> None: ...
    def released(self, node: Node) -> None: ...

    def evicted(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if self.rng.random() < self.share:
                place, is_named = path_of(node), self.rng.random() < 0.5
                self.below.remember(node, is_named=is_named)
                self.handed[place] = self.handed.pop(place, False) or is_named
                self.digests[place] = node.digest
                if len(self.handed) > self.limit:
                    del self.handed[next(iter(self.handed))]

    def lose(self, place: Place) -> None:
        """The object that is named by this chunk, and with it what nothing else holds."""
        self.below.lost(self.digests[place], GROUP)
        space, path = place
        while self.handed.pop((space, path), None) is not None:
            depth, path = len(path) // CHUNK, path[:-CHUNK]
            holds_another = any(
                s == space and p[:-CHUNK] == path and len(p) == len(path) + CHUNK for s, p in self.handed
            )
            if depth == group_begin(depth, GROUP) or self.handed.get((space, path), True) or holds_another:
                return


def drawn_chunks(drawn: TreeSnapshot) -> tuple[set[Path], set[Path]]:
    """The paths of the chunks on the device and below, each of which is told once."""
    paths: dict[str | None, Path] = {None: ()}
    found: tuple[list[Path], list[Path]] = [], []
    for branch in drawn.branches:
        above = paths[branch.parent]
        path = paths[branch.id] = above + branch.token_ids
        assert branch.depth * CHUNK == len(above)
        found[branch.is_below].extend(path[:end] for end in range(len(above) + CHUNK, len(path) + 1, CHUNK))
        if branch.is_below:
            assert branch.stored_chunks == branch.chunks
            assert branch.sharers == 0
    assert len(set(found[0] + found[1])) == len(found[0]) + len(found[1]) == drawn.shown_chunks + drawn.below_chunks
    return set(found[0]), set(found[1])


def check_drawing(store: PrefixStore, tier: SomeTier, space: int, max_chunks: int, max_depth: int | None) -> None:
    drawn = store.snapshot(SPACES[space], max_chunks, max_depth=max_depth, with_tokens=True, below=tier.below)
    cached = {path_of(node)[1] for node in store.chunks(SPACES[space])}
    reachable: set[Path] = set()
    for path in sorted((path for at, path in tier.handed if at == space), key=len):
        if path not in cached and (len(path) == CHUNK or path[:-CHUNK] in cached | reachable):
            reachable.add(path)
    device, below = drawn_chunks(drawn)
    assert device <= cached
    assert below <= reachable
    assert len(device) + len(below) <= max_chunks
    everything = cached | reachable
    paths: dict[str | None, Path] = {None: ()}
    for branch in drawn.branches:
        paths[branch.id] = paths[branch.parent] + branch.token_ids
        hanging = {path for path in everything if path[:-CHUNK] == paths[branch.id]}
        assert (branch.children, branch.hidden_children) == (len(hanging), len(hanging - device - below))
    top = {path for path in everything if len(path) == CHUNK}
    assert (drawn.children, drawn.hidden_children) == (len(top), len(top - device - below))
    if max_depth is not None:
        assert all(len(path) <= max_depth * CHUNK for path in device | below)
        everything = {path for path in everything if len(path) <= max_depth * CHUNK}
    if max_chunks >= 4 * len(everything):
        assert device | below == everything, "there is room for all"


@pytest.mark.parametrize("seed", range(6))
def test_a_snapshot_draws_what_went_below_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    tier = SomeTier(rng, limit=rng.choice([12, 1000]))
    store = PrefixStore(14, CHUNK, lambda *copy: None, watcher=tier)
    texts = [[rng.randrange(2) for _ in range(16)] for _ in range(5)]
    most_below = 0
    for _ in range(120):
        space, prompt = rng.randrange(2), rng.choice(texts)[: rng.randint(2, 16)]
        with store.acquire(prompt, SPACES[space]) as lease:
            lease.reserve(len(prompt))
            lease.commit(prompt)
            check_drawing(store, tier, space, rng.choice([1, 5, 9, 200]), rng.choice([None, None, 1, 3]))
        if tier.handed and rng.random() < 0.2:
            tier.lose(rng.choice(list(tier.handed)))
        if rng.random() < 0.03:
            tier.below.forget(SPACES[space])
            tier.handed = {place: named for place, named in tier.handed.items() if place[0] != space}
        tier.below.check()
        store.check()
        assert len(tier.below) == len(tier.handed)
        drawn = store.snapshot(SPACES[space], 200, below=tier.below)
        most_below = max(most_below, drawn.below_chunks)
        check_drawing(store, tier, 1 - space, 200, None)
    assert most_below >= 5


def fill(store: PrefixStore, space: int, tokens: Sequence[int]) -> None:
    with store.acquire(tokens, SPACES[space]) as lease:
        lease.reserve(len(tokens))
        lease.commit(tokens)


def test_what_is_on_the_device_leaves_a_quarter_of_the_picture() -> None:
    tier = SomeTier(random.Random(1), limit=1000, share=1)
    store = PrefixStore(48, CHUNK, lambda *copy: None, watcher=tier)
    for number in range(30):
        fill(store, 0, [number] * 10)
    drawn = store.snapshot(SPACES[0], 32, below=tier.below)
    assert (drawn.shown_chunks, drawn.below_chunks, drawn.children) == (24, 8, 30)
    alone = store.snapshot(SPACES[0], 32)
    assert (alone.shown_chunks, alone.below_chunks) == (32, 0)


def test_a_namespace_of_which_the_device_has_nothing_is_drawn_too() -> None:
    tier = SomeTier(random.Random(1), limit=1000, share=1)
    store = PrefixStore(4, CHUNK, lambda *copy: None, watcher=tier)
    for space in (0, 1):
        fill(store, space, range(8))
    drawn = store.snapshot(SPACES[0], 10, with_tokens=True, below=tier.below)
    assert [(each.is_below, each.chunks, each.token_ids) for each in drawn.branches] == [(True, 4, tuple(range(8)))]
    assert (drawn.cached_chunks, drawn.shown_chunks, drawn.below_chunks) == (0, 0, 4)
