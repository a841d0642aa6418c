"""Chunks as frames: a codec and the frame format put together, for whoever moves chunks to a tier and back.

Invariant: what `unpack_chunks` returns was given to `pack_chunks` for this digest, up to the codec's loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from stemcache.prefixtree.codecs.codec import SINK_TOKENS, Codec, byte_view, only_level, torch_dtype
from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.frame import Buffer, Draft, Frame, FrameHeader, pack, unpack
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.namespace import Namespace

# An object of half a MiB moves at over nine tenths of the best rate that one connection to Redis, or one file, reaches
# (measured on loopback: 1.6 GB/s at 128 KiB, 3.3 at 512 KiB, 3.5 at 1 MiB); a larger one only makes hits coarser.
_ENOUGH_BYTES: Final = 512 * 1024
_MAX_GROUP: Final = 8


def group_chunks(bytes_per_chunk: int) -> int:
    """Return how many consecutive chunks make one object: the least power of two that gives 512 KiB; 8 at most.

    It decides what a key stands for and therefore belongs in the namespace.
    """
    if bytes_per_chunk < 1:
        raise ValueError(f"a chunk has at least one byte, not {bytes_per_chunk}")
    group = 1
    while group < _MAX_GROUP and group * bytes_per_chunk < _ENOUGH_BYTES:
        group *= 2
    return group


def pack_chunks(header: FrameHeader, chunks: Sequence[Tensor], codec: Codec, *, secret: bytes | None = None) -> bytes:
    """Return the frame of consecutive chunks, host tensors of the header's layout. Its key is `header.digest`.

    Raises:
        ValueError: the chunks are not as many, or not of the shape and dtype, that the header says.
    """
    for chunk in chunks:
        if tuple(chunk.shape) != header.layout.chunk_shape or str(chunk.dtype) != f"torch.{header.layout.dtype}":
            raise ValueError(f"a chunk of {chunk.dtype} {list(chunk.shape)} is not of {header.layout}")
    if header.codec != codec.name:
        raise ValueError(f"the header names the codec {header.codec}, not {codec.name}")
    encoded = [codec.encode(chunk, sinks=_sinks(header, i)) for i, chunk in enumerate(chunks)]
    return pack(header, [list(level) for level in zip(*encoded, strict=True)], secret=secret)


class ChunkDraft:
    """Consecutive chunks on their way out: copied now, made a frame of later, perhaps on another thread.

    Attributes:
        parts: where the bytes of each chunk are to be written (see `KVPool.copy_out`).
        n_bytes: the chunks' size.
    """

    def __init__(self, header: FrameHeader, codec: Codec) -> None:
        layout, n_chunks = header.layout, header.n_chunks
        self._header, self._codec = header, codec
        self.n_bytes = n_chunks * layout.bytes_per_chunk
        if codec.is_identity:
            self._draft = Draft(header, [layout.bytes_per_chunk] * n_chunks)
            self.parts = self._draft.sections
        else:
            self._chunks = [torch.empty(layout.chunk_shape, dtype=torch_dtype(layout)) for _ in range(n_chunks)]
            self.parts = [byte_view(chunk).data for chunk in self._chunks]

    def pack(self, secret: bytes | None = None) -> Buffer:
        """Return the frame that `pack_chunks` would make. All parts have been written."""
        if self._codec.is_identity:
            return self._draft.seal(secret)
        return pack_chunks(self._header, self._chunks, self._codec, secret=secret)


def unpack_chunks(
    data: Buffer,
    digest: bytes,
    codec: Codec,
    *,
    layout: KVLayout,
    namespace: Namespace,
    secret: bytes | None = None,
    allow_fewer_levels: bool = False,
) -> list[Tensor]:
    """Return the chunks of the frame `data`, found under the key `digest`, as new host tensors.

    Memory is taken by the layout, which is the caller's own, and not by what the frame says.

    Raises:
        FrameError: `data` is not the undamaged frame of that digest, codec, layout and namespace.
    """
    frame = unpack(
        data,
        digest,
        codec=codec.name,
        layout=layout,
        namespace=namespace,
        secret=secret,
        allow_fewer_levels=allow_fewer_levels,
    )
    return _decoded(frame, codec, layout)


def unpack_bytes(
    data: Buffer, digest: bytes, codec: Codec, *, layout: KVLayout, namespace: Namespace, secret: bytes | None = None
) -> list[memoryview]:
    """As `unpack_chunks`, but bytes, as `KVPool.copy_in` takes them: views of `data` if the codec is the identity."""
    frame = unpack(data, digest, codec=codec.name, layout=layout, namespace=namespace, secret=secret)
    if not codec.is_identity:
        return [byte_view(chunk).data for chunk in _decoded(frame, codec, layout)]
    chunks = [memoryview(only_level(levels)) for levels in zip(*frame.levels, strict=True)]
    if any(len(chunk) != layout.bytes_per_chunk for chunk in chunks):
        raise FrameError("payload", f"{list(map(len, chunks))} bytes where {layout.bytes_per_chunk} belong for each")
    return chunks


def _decoded(frame: Frame, codec: Codec, layout: KVLayout) -> list[Tensor]:
    by_chunk = zip(*frame.levels, strict=True)
    return [codec.decode(levels, layout, sinks=_sinks(frame.header, i)) for i, levels in enumerate(by_chunk)]


def _sinks(header: FrameHeader, index: int) -> int:
    """How many of the first tokens of the frame's chunk `index` stand at the sequence's start."""
    return SINK_TOKENS if index == 0 and header.is_first else 0
