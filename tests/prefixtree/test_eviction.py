"""The eviction policies on a real tree, against plain models that keep every use of every prefix in a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.eviction import LFU, LRU, EvictionPolicy
from stemcache.prefixtree.frequency import FrequencySketch
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.pgdsf import PGDSF
from stemcache.prefixtree.store import PrefixStore
from stemcache.prefixtree.tokens import encode_tokens
from stemcache.prefixtree.tree import PrefixTree

SPACE = Namespace.of(model="m", dtype="float32")
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
Path = tuple[int, ...]  # one token a chunk


def cost(depth: int) -> float:
    return 1.0 + depth / 4


@dataclass
class Model:
    """What was used when, and what the priority of a leaf must then be. Counts and clocks by walking all uses."""

    uses: list[tuple[Path, float]] = field(default_factory=list)  # the end of each use, and the clock then
    since: dict[Path, int] = field(default_factory=dict)  # of each cached prefix: the number of uses before it came
    gone: dict[Path, int] = field(default_factory=dict)  # of each evicted prefix: its uses while it was cached
    history: dict[Path, int] = field(default_factory=dict)  # of each cached prefix: `gone` when it came
    born: dict[Path, float] = field(default_factory=dict)
    clock: float = 0.0

    def use(self, path: Path) -> None:
        for end in range(1, len(path) + 1):
            if path[:end] not in self.since:
                self.since[path[:end]] = len(self.uses)
                self.history[path[:end]] = self.gone.get(path[:end], 0)
                self.born[path[:end]] = self.clock
        self.uses.append((path, self.clock))

    def own(self, path: Path) -> list[tuple[Path, float]]:
        return [use for use in self.uses[self.since[path] :] if use[0][: len(path)] == path]

    def lru(self, path: Path) -> float:
        return max(index for index, (end, _) in enumerate(self.uses) if end[: len(path)] == path)

    def lfu(self, path: Path) -> float:
        return len(self.own(path))

    def pgdsf(self, path: Path) -> float:
        own = self.own(path)
        return max([self.born[path], *(clock for _, clock in own)]) + len(own) * cost(len(path))

    def remembering(self, path: Path) -> float:
        return self.pgdsf(path) + self.history[path] * cost(len(path))

    def gated(self, path: Path) -> float:
        own = self.own(path)
        counted = max(0, self.history[path] + len(own) - 1)
        return max([self.born[path], *(clock for _, clock in own)]) + counted * cost(len(path))

    def evict(self, path: Path, priority: float) -> None:
        self.clock = max(self.clock, priority)
        self.gone[path] = self.gone.get(path, 0) + len(self.own(path))
        del self.since[path]


def path_of(node: Node) -> Path:
    return tuple(int.from_bytes(each.key, "big") for each in node.upward())[::-1]


POLICIES: dict[str, tuple[Callable[[], EvictionPolicy], Callable[[Model, Path], float]]] = {
    "lru": (LRU, Model.lru),
    "lfu": (LFU, Model.lfu),
    "pgdsf": (lambda: PGDSF(cost), Model.pgdsf),
    # So wide that nothing collides, so patient that nothing fades: the history is then a plain count.
    "history": (lambda: PGDSF(cost, FrequencySketch(1 << 10, half_life=1e12)), Model.remembering),
    "gated": (lambda: PGDSF(cost, FrequencySketch(1 << 10, half_life=1e12), gate=True), Model.gated),
}


def use(tree: PrefixTree, path: Path) -> None:
    """A request's life: find what is cached, insert the rest, touch the end."""
    data = encode_tokens(path)
    node = tree.match(SPACE, data).node
    tree.pin(node)
    while (key := tree.next_key(node, data)) is not None:
        child = tree.insert(node, key, max((n.slot for n in tree.nodes()), default=-1) + 1)
        tree.unpin(node)
        node = child
    tree.touch(node)
    tree.unpin(node)


@pytest.mark.parametrize("name", POLICIES)
@SETTINGS
@given(
    st.lists(st.one_of(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), st.integers(1, 3)), max_size=40)
)
def test_the_least_worthy_leaf_goes(name: str, events: list[Path | int]) -> None:
    """A path is a request that uses it, a number so many evictions. Every priority is the plain model's."""
    make, rank = POLICIES[name]
    model, tree = Model(), PrefixTree(1, make())
    for event in events:
        if isinstance(event, tuple):
            model.use(event)
            use(tree, event)
            tree.check()
            continue
        for _ in range(event):
            leaves = {p for p in model.since if not any(q != p and q[: len(p)] == p for q in model.since)}
            ranks = {leaf: rank(model, leaf) for leaf in leaves}
            evicted = [path_of(node) for node in tree.evict(1)]
            assert len(evicted) == min(1, len(leaves))
            for path in evicted:
                assert ranks[path] == pytest.approx(min(ranks.values()))
                model.evict(path, ranks[path])
            tree.check()
    assert {path_of(node) for node in tree.nodes() if node.parent is not None} == set(model.since)


@pytest.mark.parametrize("name", POLICIES)
def test_long_histories(name: str) -> None:
    """Enough turnover that clocks move far and counts come back from the history."""
    make, rank = POLICIES[name]
    random, model, tree = Random(3), Model(), PrefixTree(1, make())
    for _ in range(400):
        path = tuple(min(int(random.paretovariate(1.0)), 9) for _ in range(random.randint(1, 3)))
        model.use(path)
        use(tree, path)
        while len(tree) > 20:
            leaves = {p for p in model.since if not any(q != p and q[: len(p)] == p for q in model.since)}
            ranks = {leaf: rank(model, leaf) for leaf in leaves}
            (node,) = tree.evict(1)
            assert ranks[path_of(node)] == pytest.approx(min(ranks.values()))
            model.evict(path_of(node), ranks[path_of(node)])
        tree.check()
    assert name in ("lru", "lfu") or model.clock > 0


@pytest.mark.parametrize(("name", "survives"), [("lru", False), ("lfu", True), ("pgdsf", False), ("gated", True)])
def test_a_scan(name: str, survives: bool) -> None:
    """A document asked for four times, then forty that are asked for once each, with room for ten.

    LRU loses it at once; so does PGDSF in the end, whose clock every passer-by moves. The gate is what stops them.
    """
    tree = PrefixTree(1, POLICIES[name][0]())
    for _ in range(4):
        use(tree, (7,))
    for stranger in range(100, 200):
        use(tree, (stranger,))
        tree.evict(len(tree) - 10)
    assert (tree.match(SPACE, encode_tokens([7])).tokens == 1) is survives


@pytest.mark.parametrize(("name", "recovers"), [("lru", True), ("lfu", False), ("pgdsf", True), ("gated", True)])
def test_drift(name: str, recovers: bool) -> None:
    """Ten documents asked for often, then ten others, with room for ten. LFU never lets go of the first."""
    tree = PrefixTree(1, POLICIES[name][0]())
    for document in [*range(10)] * 30 + [*range(10, 20)] * 25:
        use(tree, (document,))
        tree.evict(len(tree) - 10)
    found = sum(tree.match(SPACE, encode_tokens([document])).tokens for document in range(10, 20))
    assert (found == 10) is recovers


def test_a_gate_needs_a_history() -> None:
    with pytest.raises(ValueError, match="needs a history"):
        PGDSF(gate=True)


def test_dear_chunks_outlive_cheap_ones() -> None:
    tree = PrefixTree(1, PGDSF(lambda depth: float(depth)))
    use(tree, (1, 2))
    for path in [(3,), (1, 2)]:
        use(tree, path)
    use(tree, (3,))
    assert [path_of(node) for node in tree.evict(3)] == [(3,), (1, 2), (1,)], "the same uses, at twice the cost"


def test_a_request_that_could_not_start_is_no_use() -> None:
    store = PrefixStore(8, 1, lambda source, target, n: None, LFU())
    with store.acquire([1], SPACE) as lease:
        lease.reserve(1)
        lease.commit([1])
    for _ in range(5):
        store.acquire([1], SPACE).release(used=False)
    assert store.acquire([1], SPACE).node.uses == 1


def test_a_chunk_that_is_read_in_part_is_not_used_twice() -> None:
    """A request that diverges inside a chunk counts once for what is before it, and not for the chunk."""
    store = PrefixStore(8, 2, lambda source, target, n: None, LFU())
    with store.acquire([1, 2, 3, 4], SPACE) as lease:
        lease.reserve(4)
        lease.commit([1, 2, 3, 4])
    with store.acquire([1, 2, 3, 9], SPACE) as lease:
        assert lease.cached_tokens == 3
        first = lease.node
    store.clear()
    assert first.uses == 2


@pytest.mark.parametrize("policy", [LRU(), LFU(), PGDSF()])
def test_check_names_what_cannot_be(policy: EvictionPolicy) -> None:
    tree = PrefixTree(1, policy)
    use(tree, (1,))
    node = tree.match(SPACE, encode_tokens([1])).node
    node.uses, node.priority = -1, -1.0
    with pytest.raises(InvariantError, match=type(policy).__name__.lower()):
        tree.check()
