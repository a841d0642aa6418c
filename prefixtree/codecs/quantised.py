"""The quantised codec: a chunk as codes and scales of a size that only the layout decides.

Invariant: what cannot be quantised is stored as it is. That is a chunk with NaN or infinite numbers in it, or with such
large ones that a scale would be infinite.

Format: one byte (0 quantised, 1 as it is), the sinks as they are, then the quantiser's tensors one after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from stemcache.prefixtree.codecs.codec import byte_view, only_level, tensor_of, torch_dtype
from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.frame import Buffer
from stemcache.prefixtree.layout import KVLayout

Part: TypeAlias = tuple[tuple[int, ...], torch.dtype]


class Quantiser(Protocol):
    """What differs between quantised codecs."""

    def parts(self, layout: KVLayout) -> list[Part]:
        """Return shape and dtype of the tensors that `quantise` gives."""
        ...

    def quantise(self, values: Tensor) -> list[Tensor]:
        """Return codes and scales of float32 `[layers, 2, kv_heads, chunk_tokens, head_dim]`, all of it finite.

        A scale that is not finite says that it could not be done.
        """
        ...

    def restore(self, parts: Sequence[Tensor], layout: KVLayout) -> Tensor:
        """Return the values, float32."""
        ...


class QuantisedCodec:
    """The codec of one quantiser; see `Codec`."""

    is_exact = False
    is_identity = False

    def __init__(self, name: str, quantiser: Quantiser) -> None:
        self.name = name
        self._quantiser = quantiser

    def bits_per_value(self, layout: KVLayout) -> float:
        n_bytes = sum(part_bytes(part) for part in self._quantiser.parts(layout))
        return 8 * n_bytes / math.prod(layout.chunk_shape)

    def encode(self, chunk: Tensor, *, sinks: int = 0) -> list[Buffer]:
        values = without_sinks(chunk, sinks)
        parts = self._quantiser.quantise(values) if bool(values.isfinite().all()) else None
        if parts is None or not all(bool(part.float().isfinite().all()) for part in parts if part.is_floating_point()):
            return [as_it_is(chunk)]
        return [b"".join([b"\0", sink_bytes(chunk, sinks), join_parts(parts)])]

    def decode(self, levels: Sequence[Buffer], layout: KVLayout, *, sinks: int = 0) -> Tensor:
        data = memoryview(only_level(levels)).cast("B")
        if (chunk := read_as_it_is(data, layout)) is not None:
            return chunk
        kept, data = read_sinks(data, layout, sinks)
        tensors, rest = cut_parts(data, self._quantiser.parts(layout))
        if len(rest):
            raise FrameError("payload", f"{len(rest)} bytes follow the codes")
        return with_sinks(self._quantiser.restore(tensors, layout), kept, torch_dtype(layout))


def without_sinks(chunk: Tensor, sinks: int) -> Tensor:
    """Return the chunk in float32, with the next token in the sinks' places, where they cannot widen any range."""
    values = chunk.to(torch.float32, copy=True).contiguous()
    values[:, :, :, :sinks] = values[:, :, :, sinks : sinks + 1]
    return values


def sink_bytes(chunk: Tensor, sinks: int) -> memoryview:
    return byte_view(chunk[:, :, :, :sinks].contiguous()).data


def as_it_is(chunk: Tensor) -> bytes:
    """Return a level that holds the chunk's own bytes."""
    return b"\1" + byte_view(chunk.contiguous()).tobytes()


def read_as_it_is(data: memoryview, layout: KVLayout) -> Tensor | None:
    """Return the chunk if the level holds its own bytes, None if it is quantised."""
    if len(data) == 0 or data[0] > 1:
        raise FrameError("payload", "the first byte says neither that the chunk is quantised nor that it is not")
    return tensor_of(data[1:], layout.chunk_shape, torch_dtype(layout)) if data[0] else None


def read_sinks(data: memoryview, layout: KVLayout, sinks: int) -> tuple[Tensor, memoryview]:
    """Return the sinks `[layers, 2, kv_heads, sinks, head_dim]` of a quantised level, and what follows them."""
    shape = (layout.layers, 2, layout.kv_heads, sinks, layout.head_dim)
    end = 1 + part_bytes((shape, torch_dtype(layout)))
    return tensor_of(data[1:end], shape, torch_dtype(layout)), data[end:]


def with_sinks(values: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values in `dtype`, the sinks in their places. Rounding must not make the largest number infinite."""
    limit = torch.finfo(dtype).max
    chunk = values.clamp_(-limit, limit).to(dtype).contiguous()
    chunk[:, :, :, : kept.shape[3]] = kept
    return chunk


def join_parts(parts: Sequence[Tensor]) -> bytes:
    """Return the bytes of the tensors, one after another."""
    return b"".join(byte_view(part.contiguous()).data for part in parts)


def cut_parts(data: memoryview, parts: Sequence[Part]) -> tuple[list[Tensor], memoryview]:
    """Return the tensors that `data` begins with, and the rest of it.

    Raises:
        FrameError: it is too short.
    """
    if len(data) < sum(map(part_bytes, parts)):
        raise FrameError("payload", f"{len(data)} bytes of codes, {sum(map(part_bytes, parts))} belong there")
    tensors = []
    for part in parts:
        tensors.append(tensor_of(data[: part_bytes(part)], *part))
        data = data[part_bytes(part) :]
    return tensors, data


def part_bytes(part: Part) -> int:
    shape, dtype = part
    return math.prod(shape) * dtype.itemsize
