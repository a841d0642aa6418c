"""The raw codec: the chunk's own bytes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stemcache.prefixtree.codecs.codec import byte_view, only_level, tensor_of, torch_dtype
from stemcache.prefixtree.frame import Buffer
from stemcache.prefixtree.layout import DTYPE_BYTES, KVLayout


class RawCodec:
    """No change. The fastest; see `Codec`.

    A chunk's size is nearly always 2**k or 3 * 2**k bytes, and a frame's header makes sure that it does not fit
    that class of the allocator: in Redis it then takes 1.25 or 1.17 times its size. `lossless` does not have that.
    """

    name = "raw"
    is_exact = True
    is_identity = True

    def bits_per_value(self, layout: KVLayout) -> float:
        return 8.0 * DTYPE_BYTES[layout.dtype]

    def encode(self, chunk: Tensor, *, sinks: int = 0) -> list[Buffer]:
        return [byte_view(chunk.contiguous()).data]

    def decode(self, levels: Sequence[Buffer], layout: KVLayout, *, sinks: int = 0) -> Tensor:
        return tensor_of(only_level(levels), layout.chunk_shape, torch_dtype(layout))
