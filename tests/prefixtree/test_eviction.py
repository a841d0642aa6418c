"""The eviction policies on a real tree, against plain models that keep every use of every prefix in a list."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.eviction import LFU, LRU, EvictionPolicy
from stemcache.prefixtree.expected import Expected
from stemcache.prefixtree.fading_pgdsf import LEAST_USES, FadingPGDSF
from stemcache.prefixtree.frequency import FrequencySketch
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.pgdsf import PGDSF
from stemcache.prefixtree.store import PrefixStore
from stemcache.prefixtree.tokens import encode_tokens
from stemcache.prefixtree.tree import PrefixTree

SPACE = Namespace.of(model="m", dtype="float32")
SETTINGS = settings(max_examples=60)
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

    def evict(self, path: Path, priority: float) -> None:
        self.clock = max(self.clock, priority)
        self.gone[path] = self.gone.get(path, 0) + len(self.own(path))
        del self.since[path]


HALF_LIFE = 15.0


@dataclass
class Fading(Model):
    """Uses that fade: every use of a prefix counts, whenever it was, but for the one that each time brought it in."""

    updated: dict[Path, float] = field(default_factory=dict)  # when a cached prefix was last a leaf that was ranked
    ever: list[tuple[Path, float]] = field(default_factory=list)

    def use(self, path: Path) -> None:
        known = set(self.since)
        super().use(path)
        self.ever.append((path, self.clock))
        for end in range(1, len(path) + 1):
            if path[:end] not in known:
                self.updated[path[:end]] = self.clock
        self.updated[path] = self.clock

    def faded(self, path: Path, uses: list[tuple[Path, float]], now: float) -> float:
        return sum(2.0 ** (clock - now) for end, clock in uses if end[: len(path)] == path)

    def fading(self, path: Path) -> float:
        now = self.updated[path]
        counted = self.faded(path, self.ever, now) - 2.0 ** (self.born[path] - now)
        return now + math.log2(counted * cost(len(path))) if counted >= LEAST_USES * (1 - 1e-5) else -math.inf

    def evict(self, path: Path, priority: float) -> None:
        self.clock += self.faded(path, self.own(path), self.clock) / HALF_LIFE
        self.gone[path] = self.gone.get(path, 0) + len(self.own(path))
        del self.since[path]
        self.updated[path[:-1]] = self.clock


def path_of(node: Node) -> Path:
    return tuple(int.from_bytes(each.key, "big") for each in node.upward())[::-1]


def fading() -> FadingPGDSF:
    return FadingPGDSF(FrequencySketch(1 << 10, HALF_LIFE), cost)


POLICIES: dict[str, tuple[Callable[[], EvictionPolicy], Callable[..., float]]] = {
    "lru": (LRU, Model.lru),
    "lfu": (LFU, Model.lfu),
    "pgdsf": (lambda: PGDSF(cost), Model.pgdsf),
    # So wide that nothing collides, so patient that nothing fades: the history is then a plain count.
    "history": (lambda: PGDSF(cost, FrequencySketch(1 << 10, half_life=1e12)), Model.remembering),
    "fading": (fading, Fading.fading),
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
    model, tree = Fading() if name == "fading" else Model(), PrefixTree(1, make())
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
    random, model, tree = Random(3), Fading() if name == "fading" else Model(), PrefixTree(1, make())
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


@pytest.mark.parametrize(("name", "survives"), [("lru", False), ("lfu", True), ("pgdsf", False), ("fading", True)])
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


@pytest.mark.parametrize(("name", "recovers"), [("lru", True), ("lfu", False), ("pgdsf", True), ("fading", True)])
def test_drift(name: str, recovers: bool) -> None:
    """Ten documents asked for often, then ten others, with room for ten. LFU never lets go of the first."""
    tree = PrefixTree(1, POLICIES[name][0]())
    for document in [*range(10)] * 30 + [*range(10, 20)] * 25:
        use(tree, (document,))
        tree.evict(len(tree) - 10)
    found = sum(tree.match(SPACE, encode_tokens([document])).tokens for document in range(10, 20))
    assert (found == 10) is recovers


def test_old_fame_fades() -> None:
    """What was asked for a hundred times long ago goes before what is asked for now and then."""
    tree = PrefixTree(1, fading())
    for _ in range(100):
        use(tree, (7,))
    for stranger in range(100, 280):
        use(tree, (stranger,))
        if stranger % 20 == 0:
            use(tree, (8,))
        tree.evict(len(tree) - 10)
    found = tree.match(SPACE, encode_tokens([7])).tokens, tree.match(SPACE, encode_tokens([8])).tokens
    assert found == (1, 1), "passers-by leave both alone"
    assert [path_of(node) for node in tree.evict(10)][-2:] == [(7,), (8,)]


def test_what_runs_for_long_is_no_better_than_other_passers_by() -> None:
    """Uses fade between the moment a chunk is read and the end of its request; the gate takes back all of the first."""
    tree = PrefixTree(1, fading())
    long = tree.insert(tree.match(SPACE, b"").node, encode_tokens([1]), 0)
    use(tree, (2,))
    tree.evict(1)
    use(tree, (3,))
    tree.touch(long)
    tree.unpin(long)
    use(tree, (4,))
    assert [path_of(node) for node in tree.evict(3)] == [(3,), (1,), (4,)], "all are worth nothing: the oldest first"


def test_what_is_expected_outlives_what_is_not() -> None:
    """Newcomers go in the order of how often they were asked for elsewhere, and before who was used twice here."""
    store = PrefixStore(16, 2, lambda source, target, n: None, FadingPGDSF(FrequencySketch(64, 1e9)))
    for _ in range(2):
        with store.acquire([9, 9], SPACE) as lease:
            lease.reserve(2)
            lease.commit([9, 9])
    for token, uses in [(1, 2.0), (2, 0.0), (3, 1.0), (4, 0.5), (5, 1e6)]:
        with store.acquire([token] * 6, SPACE) as lease:
            lease.expected = Expected([(3, uses)])
            lease.reserve(6)
            lease.commit([token] * 4)
    order: list[int] = []
    while len(cached := {node.key[3] for node in store.chunks()}) > 0:
        store._ledger.evict(1)
        order += sorted(cached - {node.key[3] for node in store.chunks()})
    assert order == [2, 4, 3, 1, 5, 9], "a quarter of each, half a use at most, which is less than one that was seen"


@pytest.mark.parametrize(
    ("prefixes", "wrong"),
    [
        ([(5, 1.0), (5, 2.0)], "ascend"),
        ([(5, 1.0), (4, 2.0)], "ascend"),
        ([(5, -1.0)], "finite"),
        ([(5, math.inf)], "finite"),
    ],
)
def test_expectations_that_cannot_be_are_refused(prefixes: list[tuple[int, float]], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Expected(prefixes)


@given(st.dictionaries(st.integers(1, 50), st.floats(0, 9)), st.integers(1, 60))
def test_a_prefix_has_the_expectation_of_the_first_that_it_is_part_of(given: dict[int, float], length: int) -> None:
    at = min((stop for stop in given if stop >= length), default=None)
    assert Expected(sorted(given.items())).of(length) == (0.0 if at is None else given[at])


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


@pytest.mark.parametrize("policy", [LRU(), LFU(), PGDSF(), fading()])
def test_check_names_what_cannot_be(policy: EvictionPolicy) -> None:
    tree = PrefixTree(1, policy)
    use(tree, (1,))
    node = tree.match(SPACE, encode_tokens([1])).node
    node.uses, node.priority = -1, -1.0
    with pytest.raises(InvariantError, match=type(policy).__name__.lower().replace("fading", "fading ")):
        tree.check()
