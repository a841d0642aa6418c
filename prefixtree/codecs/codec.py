"""The codec protocol: one chunk of keys and values to bytes and back.

Invariant: `decode(encode(chunk))` has the chunk's shape and dtype and, if the codec is exact, its very bits. A lossy
codec's numbers depend on nothing but the chunk's own, so equal chunks stay equal; it belongs in the namespace, since a
lossy hit must never pass for an exact one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.frame import Buffer
from stemcache.prefixtree.layout import KVLayout

# The first tokens of a sequence draw much attention whatever they are (attention sinks, StreamingLLM, arXiv 2309.17453)
# and have the largest outliers in their keys. KIVI, KVQuant and KVTC leave them as they are; so does every codec here.
SINK_TOKENS: Final = 4


class Codec(Protocol):
    """One way to encode a chunk, a host tensor `[layers, 2, kv_heads, chunk_tokens, head_dim]`.

    Keeps no state between calls, so several threads may share one.

    Attributes:
        name: as users write it, and as frames and namespaces carry it. Another format needs another name.
        is_exact: whether decoding gives the very bits.
        is_identity: whether the one level of a chunk is the chunk's own bytes, so that nobody need encode or decode.
    """

    name: str
    is_exact: bool
    is_identity: bool

    def bits_per_value(self, layout: KVLayout) -> float:
        """Return the bits that each number of a chunk takes, scales included; an estimate where the data decides."""
        ...

    def encode(self, chunk: Tensor, *, sinks: int = 0) -> list[Buffer]:
        """Return the chunk's levels, coarsest first; one, unless the codec is progressive.

        Args:
            chunk: any strides. Read before this returns, unless the result is a view (`raw` of a contiguous chunk).
            sinks: how many of its first tokens keep their bits: SINK_TOKENS at position 0, else none.
        """
        ...

    def decode(self, levels: Sequence[Buffer], layout: KVLayout, *, sinks: int = 0) -> Tensor:
        """Return the chunk, new and contiguous, from its first levels or all of them.

        Raises:
            FrameError: the levels cannot come from `encode` of such a chunk. (Its reason is "payload".)
        """
        ...


def byte_view(tensor: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return the bytes of a contiguous host tensor, without a copy. (numpy has no bfloat16, but bytes.)"""
    view: np.ndarray[tuple[int], np.dtype[np.uint8]] = tensor.view(-1).view(torch.uint8).numpy()
    return view


def tensor_of(data: Buffer, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a new tensor of these bytes.

    Raises:
        FrameError: they are more or fewer than it needs.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype)
    view, source = byte_view(tensor), np.frombuffer(data, dtype=np.uint8)
    if source.size != view.size:
        raise FrameError("payload", f"{source.size} bytes where {view.size} belong")
    view[:] = source
    return tensor


def only_level(levels: Sequence[Buffer]) -> Buffer:
    """Return the one level of a codec that is not progressive.

    Raises:
        FrameError: there are more, or none.
    """
    if len(levels) != 1:
        raise FrameError("payload", f"{len(levels)} levels where one belongs")
    return levels[0]


def torch_dtype(layout: KVLayout) -> torch.dtype:
    """Return the layout's dtype as torch names it."""
    dtype: torch.dtype = getattr(torch, layout.dtype)
    return dtype
