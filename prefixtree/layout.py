"""The layout: the shape and size of one chunk of keys and values.

Invariant: two pools with equal layouts hold interchangeable chunks. The layout therefore belongs in the namespace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stemcache.prefixtree.errors import CapacityError

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One chunk is `[layers, 2, kv_heads, chunk_tokens, head_dim]` of `dtype`, keys at index 0 of the second axis.

    Raises:
        ValueError: a size is not positive, the dtype is unknown, or chunk_tokens is not a power of two from 16 to 256.
            (Smaller chunks drown the kernel in bookkeeping; larger ones waste memory in every sequence's tail.)
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    chunk_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")
        if self.chunk_tokens not in (16, 32, 64, 128, 256):
            raise ValueError(f"chunk_tokens must be a power of two from 16 to 256, not {self.chunk_tokens}")

    @property
    def chunk_shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, 2, kv_heads, chunk_tokens, head_dim]`."""
        return self.layers, 2, self.kv_heads, self.chunk_tokens, self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers: 2 * layers * kv_heads * head_dim * itemsize."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_chunk(self) -> int:
        return self.bytes_per_token * self.chunk_tokens

    def chunks_in(self, pool_bytes: int) -> int:
        """Return how many chunks fit into `pool_bytes`.

        Raises:
            CapacityError: not even one does.
        """
        n_chunks = pool_bytes // self.bytes_per_chunk
        if n_chunks < 1:
            raise CapacityError(f"a pool of {pool_bytes} bytes holds no chunk of {self.bytes_per_chunk} bytes")
        return n_chunks
