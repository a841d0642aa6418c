"""The prefix tree by itself: matching, eviction order, pins, and that `check()` sees what is broken."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from stemcache.prefixtree.errors import InvariantError
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node
from stemcache.prefixtree.tokens import encode_tokens
from stemcache.prefixtree.tree import PrefixTree

C = 2


def add(tree: PrefixTree, namespace: Namespace, text: str) -> Node:
    """Insert the chunks of `text`, a letter a token; slots are counted up."""
    data = encode_tokens([ord(letter) for letter in text])
    node = tree.match(namespace, data).node
    while (key := tree.next_key(node, data)) is not None:
        node = tree.insert(node, key, len(tree))
        tree.unpin(node)
    tree.check()
    return node


def evict(tree: PrefixTree, n: int) -> list[int]:
    """Evict and return the slots."""
    return [node.slot for node in tree.evict(n)]


def longest(tree: PrefixTree, namespace: Namespace, text: str) -> int:
    return tree.match(namespace, encode_tokens([ord(letter) for letter in text])).tokens


def test_matching_is_token_granular(namespace: Namespace) -> None:
    # root -> ab -> cd -> ef
    #            -> cx
    tree = PrefixTree(C)
    add(tree, namespace, "abcdef")
    add(tree, namespace, "abcx")
    expected = {"": 0, "a": 1, "ab": 2, "ax": 1, "abc": 3, "abca": 3, "abcz": 3, "abcdez": 5, "abcdefgh": 6, "xb": 0}
    assert {text: longest(tree, namespace, text) for text in expected} == expected


def test_matching_has_no_side_effects(namespace: Namespace) -> None:
    tree = PrefixTree(C)
    longest(tree, namespace, "abcd")
    assert list(tree.nodes()) == []


def test_namespaces_share_nothing(namespace: Namespace) -> None:
    tree = PrefixTree(C)
    add(tree, namespace, "abcd")
    assert longest(tree, Namespace.of(model="m", dtype="float32", tenant="t"), "abcd") == 0


def test_the_closest_child_is_found_among_many(namespace: Namespace) -> None:
    random = Random(1)
    tree = PrefixTree(4)
    texts = {"".join(random.choices("abc", k=4)) for _ in range(40)}
    for text in texts:
        add(tree, namespace, text)
    for _ in range(200):
        text = "".join(random.choices("abc", k=random.randint(0, 4)))
        naive = max(sum(1 for i in range(len(text)) if text[: i + 1] == other[: i + 1]) for other in texts)
        assert longest(tree, namespace, text) == naive


def test_leaves_go_first_and_the_least_recently_used_first(namespace: Namespace) -> None:
    # root -> ab(0) -> cd(1) -> ef(2)
    #               -> gh(3)
    #      -> xy(4)
    tree = PrefixTree(C)
    ef = add(tree, namespace, "abcdef")
    add(tree, namespace, "abgh")
    add(tree, namespace, "xy")
    tree.touch(ef)  # used after all others, and with it cd and ab
    assert [slot for _ in range(5) for slot in evict(tree, 1)] == [3, 4, 2, 1, 0]
    tree.check()
    assert evict(tree, 1) == []
    assert list(tree.nodes()) == [], "the root of an empty namespace must go too"


def test_a_parent_inherits_the_recency_of_its_last_child(namespace: Namespace) -> None:
    # root -> ab(0) -> cd(2)
    #      -> xy(1)
    tree = PrefixTree(C)
    add(tree, namespace, "ab")
    xy = add(tree, namespace, "xy")
    add(tree, namespace, "abcd")
    tree.pin(xy)
    assert evict(tree, 1) == [2]
    tree.unpin(xy)
    assert evict(tree, 1) == [1], "ab was used, as part of abcd, after xy"


def test_a_pin_shelters_its_whole_path_and_nothing_else(namespace: Namespace) -> None:
    tree = PrefixTree(C)
    cd = add(tree, namespace, "abcd")
    add(tree, namespace, "abcdef")
    add(tree, namespace, "abxy")
    tree.pin(cd)
    tree.pin(cd)
    assert tree.n_sheltered() == 2
    assert tree.can_evict(2)
    assert not tree.can_evict(3)
    assert sorted(evict(tree, 9)) == [2, 3]
    tree.unpin(cd)
    tree.check()
    assert evict(tree, 9) == [], "pins are counted"
    tree.unpin(cd)
    assert evict(tree, 9) == [1, 0]


def test_a_pinned_root_stays(namespace: Namespace) -> None:
    tree = PrefixTree(C)
    root = tree.match(namespace, b"").node
    tree.pin(root)
    add(tree, namespace, "ab")
    assert evict(tree, 9) == [0]
    tree.check()
    assert tree.match(namespace, b"").node is root
    tree.unpin(root)
    assert list(tree.nodes()) == []


def test_the_heap_does_not_grow_with_touches(namespace: Namespace) -> None:
    tree = PrefixTree(C)
    nodes = [add(tree, namespace, f"{letter}{letter}") for letter in "abcdef"]
    for turn in range(1_000):
        tree.touch(nodes[turn % 5])
        tree.check()
        assert len(tree._heap) < 100
    assert evict(tree, 6) == [5, 0, 1, 2, 3, 4]


def test_bad_inserts_are_refused(namespace: Namespace) -> None:
    tree = PrefixTree(C)
    node = add(tree, namespace, "ab")
    with pytest.raises(ValueError, match="a chunk has 2 tokens, not 1"):
        tree.insert(node, encode_tokens([1]), 1)
    tree.insert(node, encode_tokens([1, 2]), 1)
    with pytest.raises(ValueError, match="already"):
        tree.insert(node, encode_tokens([1, 2]), 2)
    with pytest.raises(ValueError, match="at least 1"):
        PrefixTree(0)


def swap_order(tree: PrefixTree, node: Node) -> None:
    assert node.parent is not None
    node.parent.order.reverse()


def set_slot(tree: PrefixTree, node: Node) -> None:
    node.slot = 0


def set_leases(tree: PrefixTree, node: Node) -> None:
    node.leases = 1


def negative_leases(tree: PrefixTree, node: Node) -> None:
    node.leases = -1


def set_ticket(tree: PrefixTree, node: Node) -> None:
    node.ticket = 0


def set_parent(tree: PrefixTree, node: Node) -> None:
    node.parent = node


def set_depth(tree: PrefixTree, node: Node) -> None:
    node.depth += 1


def lose_node(tree: PrefixTree, node: Node) -> None:
    tree._n_nodes += 1


def empty_heap(tree: PrefixTree, node: Node) -> None:
    tree._heap.clear()


def set_priority(tree: PrefixTree, node: Node) -> None:
    node.priority += 1


def empty_root(tree: PrefixTree, node: Node) -> None:
    tree._roots[b"x"] = Node(None, b"x", -1)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (swap_order, "sorted keys"),
        (set_slot, "share a slot"),
        (set_leases, "pinned set|offered for eviction"),
        (negative_leases, "negative lease count"),
        (set_ticket, "offered for eviction"),
        (set_parent, "wrong parent"),
        (set_depth, "one deeper"),
        (lose_node, "counted"),
        (empty_heap, "heap"),
        (set_priority, "lru|heap"),
        (empty_root, "nothing hangs"),
    ],
)
def test_check_names_what_is_broken(
    namespace: Namespace, break_it: Callable[[PrefixTree, Node], None], message: str
) -> None:
    tree = PrefixTree(C)
    add(tree, namespace, "abef")
    node = add(tree, namespace, "abcd")
    tree.check()
    break_it(tree, node)
    with pytest.raises(InvariantError, match=message):
        tree.check()
