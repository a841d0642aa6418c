"""Runs: which consecutive chunks make one object of a tier, and which objects a prompt may find there.

Invariant: an object holds the chunks of one path from the beginning of a group of `size` chunks to the one that names
it, which is the group's last, or an earlier one where a path ends or branches. So the objects of a path are found from
its chunks' digests alone, and every chunk of a prompt is in at most `size` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stemcache.prefixtree.node import Node


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks number `first` to `last` of a path, counted from 1; the object is named by the last one's digest."""

    first: int
    last: int


def group_begin(depth: int, size: int) -> int:
    """Return the depth of the first chunk in the group of the chunk at `depth`."""
    return depth - (depth - 1) % size


def nodes_of_run(node: Node, size: int) -> list[Node]:
    """Return the nodes of the object that `node` names, first one first."""
    begin = group_begin(node.depth, size)
    nodes = [each for each in node.upward() if each.depth >= begin] if size > 1 else [node]
    nodes.reverse()
    return nodes


def runs_after(depth: int, present: Sequence[bool], size: int) -> list[Run]:
    """Return the objects from which a path can be continued, in order and without a hole.

    Args:
        depth: chunks that are there already.
        present: for each chunk that follows, whether an object of its name is to be had.
    """
    runs: list[Run] = []
    end = depth + len(present)
    while depth < end:
        first = group_begin(depth + 1, size)
        stop = min(first + size - 1, end)
        last = next((at for at in range(stop, depth, -1) if present[at - 1 - end]), depth)
        if last == depth:
            break
        runs.append(Run(first, last))
        depth = last
        if last < stop:
            break
    return runs
