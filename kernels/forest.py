"""The batch's prefix forest: which runs of chunks are read by which sequences.

Invariant: `nodes()` lists every maximal run of chunks that two or more sequences have in common, parents before their
children, over sequences in the order of `Forest.order`, in which the sequences of any node are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Node:
    """A run of chunks common to `order[first:last]`, ending at chunk depth `end`; it begins where its parent ends.

    `branches` counts the readers that remain if this node is not read for all at once: its child nodes, plus the
    sequences that are in none of them.
    """

    first: int
    last: int
    end: int
    branches: int


@dataclass(slots=True)
class _Open:
    """A node of the stack pass whose last sequence is not known yet; `merged` sequences vanish into its children."""

    end: int
    first: int
    merged: int


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """Sequences in depth-first order. `order[i]` is the caller's index; `common[i]` the chunks that i and i+1 share."""

    order: tuple[int, ...]
    common: tuple[int, ...]

    @classmethod
    def build(cls, prefixes: Sequence[NDArray[np.int32]]) -> Forest:
        """Order the chunk-id prefixes depth first.

        Ids that are equal up to a depth mean the same chunks with the same history, so sorting the arrays' bytes is a
        depth-first walk of the forest; the bytes' own order does not matter. One comparison of neighbouring rows then
        gives every shared depth. Walking a tree of Python nodes here cost more than the attention of a small batch.
        """
        order = sorted(range(len(prefixes)), key=lambda i: prefixes[i].tobytes())
        lengths = np.array([len(prefixes[i]) for i in order], dtype=np.int64)
        table = np.full((len(order), int(lengths.max(initial=0)) + 1), -1, dtype=np.int32)
        for row, i in enumerate(order):
            table[row, : lengths[row]] = prefixes[i]
        differs = table[1:] != table[:-1]
        differs[:, -1] = True  # a sentinel column: identical prefixes end there
        common = np.minimum(differs.argmax(axis=1), np.minimum(lengths[1:], lengths[:-1]))
        return cls(tuple(order), tuple(int(depth) for depth in common))

    def nodes(self) -> list[Node]:
        """The shared nodes, parents first: the intervals of `common` by the usual stack pass, reversed."""
        nodes: list[Node] = []
        stack: list[_Open] = []
        for last, depth in enumerate((*self.common, 0), start=1):
            first, merged = last - 1, 0
            while stack and stack[-1].end > depth:
                top = stack.pop()
                nodes.append(Node(top.first, last, top.end, last - top.first - top.merged - merged))
                first, merged = top.first, last - top.first - 1
            if depth > (stack[-1].end if stack else 0):
                stack.append(_Open(depth, first, merged))
            elif stack:
                stack[-1].merged += merged
        nodes.reverse()
        return nodes
