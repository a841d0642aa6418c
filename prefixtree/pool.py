"""The KV pool: the one tensor in which a device's chunks live.

Invariant: the tensor is allocated once, zeroed, and never moves; a slot is an index into its chunk axis. Which slot
belongs to whom is not known here; several threads may copy in at once, as long as their slots differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from stemcache.prefixtree.device_copies import DeviceCopies
from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.host_memory import zeroed
from stemcache.prefixtree.layout import KVLayout


class KVPool:
    """`n_chunks` slots of `layout` on one device.

    Attributes:
        tensor: `[layers, 2, kv_heads, n_chunks, chunk_tokens, head_dim]`. The tokens of one chunk and head are
            contiguous (a tile for a kernel), and so are those of consecutive slots (a zero-copy run for a CPU). Zeroed,
            because attention may read, and mask, slots that were never written, and zero times NaN would be NaN.

    Raises:
        CapacityError: n_chunks is under one, or the device has not that much memory.
    """

    def __init__(self, layout: KVLayout, n_chunks: int, device: str | torch.device = "cpu") -> None:
        if n_chunks < 1:
            raise CapacityError(f"a pool needs at least one chunk, not {n_chunks}")
        shape = (layout.layers, 2, layout.kv_heads, n_chunks, layout.chunk_tokens, layout.head_dim)
        size = n_chunks * layout.bytes_per_chunk
        try:
            self.tensor = _zeros(size, device).view(getattr(torch, layout.dtype)).view(shape)
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory errors are RuntimeErrors
            raise CapacityError(
                f"a pool of {n_chunks:,} chunks ({size:,} bytes) does not fit on {device}, take a smaller one: {error}"
            ) from error
        self.layout = layout
        self.n_chunks = n_chunks
        # numpy copies a chunk's tiles of a few KB by memcpy: a fifth faster than torch, whose loop is made for strides.
        # And it takes read-only memory, of which torch makes a tensor only with a warning.
        self._bytes = self.tensor.view(torch.uint8).numpy() if self.tensor.device.type == "cpu" else None
        self._copies = DeviceCopies(self.tensor) if self.tensor.device.type == "cuda" else None

    def layer(self, index: int) -> torch.Tensor:
        """Return one layer as a view `[2, kv_heads, n_chunks, chunk_tokens, head_dim]`."""
        return self.tensor[index]

    def copy_tokens(self, source_slot: int, target_slot: int, n_tokens: int) -> None:
        """Copy the keys and values of the first `n_tokens` tokens of a slot, in all layers, into another slot."""
        self.tensor[:, :, :, target_slot, :n_tokens] = self.tensor[:, :, :, source_slot, :n_tokens]

    def wipe(self, slots: Sequence[int]) -> None:
        """Overwrite the keys and values of slots with zeros."""
        if slots:
            self.tensor[:, :, :, list(slots)] = 0

    def read_chunk(self, slot: int) -> torch.Tensor:
        """Return a copy of one slot in host memory, contiguous `[layers, 2, kv_heads, chunk_tokens, head_dim]`.

        Raises:
            IndexError: there is no such slot. (A negative one would be another chunk's data.)
        """
        self._check_slot(slot)
        shape = self.layout.chunk_shape
        return torch.empty(shape, dtype=self.tensor.dtype).copy_(self.tensor[:, :, :, slot])

    def write_chunk(self, slot: int, chunk: torch.Tensor) -> None:
        """Copy `chunk`, as `read_chunk` gives it, into a slot.

        Raises:
            IndexError: there is no such slot.
            ValueError: the chunk's shape or dtype is not the layout's. (`copy_` would broadcast and convert it.)
        """
        self._check_slot(slot)
        if tuple(chunk.shape) != self.layout.chunk_shape or chunk.dtype != self.tensor.dtype:
            wanted = f"{self.layout.dtype} {list(self.layout.chunk_shape)}"
            raise ValueError(f"a chunk of this pool is {wanted}, not {chunk.dtype} {list(chunk.shape)}")
        self.tensor[:, :, :, slot].copy_(chunk)

    def copy_out(self, slot: int, target: memoryview) -> None:
        """Copy one slot into host memory, the bytes of `read_chunk`, without anything in between.

        Raises:
            IndexError: there is no such slot.
            ValueError: the target is not as large as a chunk.
        """
        self.start_copy_out(slot, target)()

    def start_copy_out(self, slot: int, target: memoryview) -> Callable[[], None]:
        """As `copy_out`, but the bytes are there only when the returned function, on any thread, has returned.

        The slot may be given up at once: on a GPU its copy is ordered before whatever is computed next, and on a CPU it
        has been made.
        """
        self._check_slot(slot)
        into = self._chunk_bytes(target)
        if self._copies is not None:
            return self._copies.start_out(slot, into)
        into[...] = self._host_bytes()[:, :, :, slot]
        return _nothing

    def copy_in(self, slot: int, source: bytes | bytearray | memoryview) -> None:
        """Copy into one slot what `copy_out` gave, without anything in between. The source may be read-only.

        Raises:
            IndexError: there is no such slot.
            ValueError: the source is not as large as a chunk.
        """
        self._check_slot(slot)
        chunk = self._chunk_bytes(source)
        if self._copies is not None:
            self._copies.copy_in(slot, chunk)
        else:
            self._host_bytes()[:, :, :, slot] = chunk

    def _host_bytes(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        assert self._bytes is not None, "pools are in host memory or on a GPU"
        return self._bytes

    def _chunk_bytes(self, data: bytes | bytearray | memoryview) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """`data` as bytes `[layers, 2, kv_heads, chunk_tokens, head_dim * itemsize]`."""
        found: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(data, dtype=np.uint8)
        if found.size != self.layout.bytes_per_chunk:
            raise ValueError(f"a chunk of this pool has {self.layout.bytes_per_chunk} bytes, not {found.size}")
        return found.reshape(*self.layout.chunk_shape[:-1], -1)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.n_chunks:
            raise IndexError(f"there is no slot {slot} in a pool of {self.n_chunks}")


def _zeros(n_bytes: int, device: str | torch.device) -> torch.Tensor:
    """Zeros in a device's memory, uint8 `[n_bytes]`."""
    if torch.device(device).type == "cpu":
        return zeroed(n_bytes)
    return torch.zeros(n_bytes, dtype=torch.uint8, device=device)


def _nothing() -> None:
    pass
