"""Chunks between a GPU's pool and host memory, beside what the GPU computes: side streams and pinned memory.

Invariant: a slot may be given to somebody else as soon as its copy out has been started, and what was copied in is
there when `copy_in` returns. The computing stream never waits for a transfer, but gathers a chunk's tiles itself.

**Not run yet**: no machine of ours had a GPU. tests/prefixtree/test_layout_and_pool.py runs it where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]


class DeviceCopies:
    """Copies for one pool tensor `[layers, 2, kv_heads, n_chunks, chunk_tokens, head_dim]` on a GPU."""

    def __init__(self, pool: Tensor) -> None:
        self._pool = pool
        self._out, self._in = torch.cuda.Stream(pool.device), torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._gathered: Any = None  # the event of the last one; until then, some slot may still be read from

    def start_out(self, slot: int, target: Bytes) -> Callable[[], None]:
        """Copy a slot out, in the order of the calling thread's stream; the bytes are in `target` once the returned
        function has returned, which any thread may call.

        target: uint8[layers, 2, kv_heads, chunk_tokens, head_dim * itemsize].
        """
        gathered = self._pool[:, :, :, slot].contiguous()
        self._gathered = _event_now()
        host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
        with torch.cuda.stream(self._out):
            self._out.wait_event(self._gathered)
            host.copy_(gathered, non_blocking=True)
            gathered.record_stream(self._out)  # its memory is not given away before the copy has been made
            done = _event_now()

        def finish() -> None:
            done.synchronize()
            target[...] = host.view(torch.uint8).numpy()

        return finish

    def copy_in(self, slot: int, chunk: Bytes) -> None:
        """Copy a chunk of `start_out`'s shape into a slot that nobody computes with. Any thread."""
        host = torch.empty(chunk.shape, dtype=torch.uint8, pin_memory=True)
        host.numpy()[...] = chunk
        with torch.cuda.stream(self._in):
            if self._gathered is not None:
                self._in.wait_event(self._gathered)
            self._pool[:, :, :, slot].copy_(host.to(self._pool.device, non_blocking=True).view(self._pool.dtype))
            done = _event_now()
        done.synchronize()


def _event_now() -> Any:
    """An event after all that the current stream was given."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
