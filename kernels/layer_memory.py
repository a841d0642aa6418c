"""What a step's layers leave for the next one of as many rows: the stages that they wrote down, and memory for results.

Invariant: all of it is of one number of rows and of threads, and one step at a time uses it.

A decode step's layers differ from those of the step before in three things: their input, the angles and the plan. To
write a layer down anew takes Python 100 us, to run it again 20, where one sequence's products take 300.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import prod
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stemcache.kernels.layer_parts import LayerStages

MOST_ROWS: Final = 64
"""Of a step whose stages are kept: with more of them what Python does is little beside the layer."""


class LayerMemory:
    """The stages of a model's layers, and what they compute between their input and their result.

    Layers run one after another, so they share the memory: what is the third result in all of them lies in one place.
    """

    def __init__(self) -> None:
        self._kind = (0, 0)
        self._written: dict[Hashable, LayerStages] = {}
        self._results: list[Tensor] = []

    def written(self, layer: Hashable, n_rows: int) -> LayerStages | None:
        """What a layer wrote down in the last step, if that had as many rows and threads."""
        return self._written.get(layer) if self._kind == (n_rows, torch.get_num_threads()) else None

    def keep(self, layer: Hashable, stages: LayerStages, n_rows: int) -> None:
        """Keep what a layer has written down, and nothing of other numbers of rows or threads."""
        kind = n_rows, torch.get_num_threads()
        if kind != self._kind:
            self._written.clear()
            self._kind = kind
        self._written[layer] = stages

    def result(self, index: int, shape: tuple[int, ...]) -> Tensor:
        """Memory for a layer's result of this index: bfloat16, contiguous."""
        size = prod(shape)
        if index == len(self._results):
            self._results.append(torch.empty(0, dtype=torch.bfloat16))
        if self._results[index].numel() < size:  # what was written down over the smaller one holds on to it
            self._results[index] = torch.empty(size, dtype=torch.bfloat16)
        return self._results[index][:size].view(shape)
