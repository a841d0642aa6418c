"""The mover: copies passages that were read alone to where they stand in a sequence's prompt.

Invariant: it reads cached chunks and writes only slots that are private to one lease, which from the first moved token
on never publishes anything. What is not cached any more is not moved, and then simply computed.

Touched by the engine's thread only.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stemcache.engine.blend import Moved
from stemcache.engine.errors import BlendRefusedError
from stemcache.engine.sequence import Request
from stemcache.kernels.rotation import Move, move_tokens
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.pool import KVPool
from stemcache.prefixtree.store import Lease, PrefixStore

if TYPE_CHECKING:
    from stemcache.engine.runner import ModelRunner

# Of the largest key: a few roundings of the dtype, and of the angles, which models compute in float32.
_ROUNDING: Final = {"float32": 2e-4, "bfloat16": 2e-2, "float16": 4e-3}
_POSITIONS: Final = (3, 997)


class Mover:
    """Moves tokens within one pool. frequencies: float[r], the model's `inv_freq`; None where it has not just one."""

    def __init__(self, store: PrefixStore, pool: KVPool, frequencies: Tensor | None) -> None:
        self._store = store
        self._pool = pool
        self.frequencies = frequencies
        self.is_proved = False

    def touch(self, request: Request) -> None:
        """Make what may be moved for a request the last to be evicted."""
        for tokens in self._alone(request):
            self._store.pin(tokens, request.namespace).release(used=False)

    def move(self, request: Request, lease: Lease) -> tuple[Moved, ...]:
        """Move what is cached of a request's passages, but for what is cached in its place; returns what was moved.

        lease: the request's, with slots for its whole prompt.
        """
        blend, frequencies = request.blend, self.frequencies
        assert blend is not None
        assert frequencies is not None, "blends are refused where there is no one rotation"
        moved: list[Moved] = []
        moves: list[Move] = []
        with ExitStack() as sources:
            for passage, tokens in zip(blend.passages, self._alone(request), strict=True):
                start, stop = max(passage[0], lease.cached_tokens), min(passage[1], len(request.prompt) - 1)
                first = max(start, passage[0] + blend.computed_again(passage))
                if first >= stop:
                    continue
                source = sources.enter_context(self._store.pin(tokens, request.namespace))
                shift = passage[0] - blend.head
                stop = min(stop, source.cached_tokens + shift)
                if first >= stop:
                    continue
                moved.append(Moved(start, stop, first - start))
                moves.append(Move(self._at(source, first - shift, stop - shift), self._at(lease, first, stop), shift))
            if moved:
                lease.keep_private(moved[0].kept.start)
                move_tokens(self._pool.tensor, moves, frequencies)
        return tuple(moved)

    def prove_rotation(self, runner: ModelRunner) -> None:
        """Show that in every layer a moved key is the key that the model computes at the new position.

        One token that sees nothing but itself is read at two positions: whatever the layers do to it is then the same
        at both, except for the rotation of its keys. Raises BlendRefusedError, CapacityError.
        """
        if self.frequencies is None:
            raise BlendRefusedError("documents cannot be moved in this model: it has not just one set of rotary angles")
        size = self._store.chunk_tokens
        here, there = (min(position, runner.context_length - 1) for position in _POSITIONS)
        with self._store.acquire([], Namespace(os.urandom(32))) as lease:
            lease.reserve(3 * size)
            runner.read_alone(lease.slots[:2], (here, there))
            old, moved = (np.array([lease.slots[i] * size]) for i in (0, 2))
            move_tokens(self._pool.tensor, [Move(old, moved, there - here)], self.frequencies)
            keys = self._pool.tensor[:, 0, :, :, 0].float()
            expected, actual = keys[:, :, lease.slots[1]], keys[:, :, lease.slots[2]]
            error = float((actual - expected).abs().max() / expected.abs().max())
        if not error <= _ROUNDING[self._pool.layout.dtype]:
            raise BlendRefusedError(
                f"keys of this model cannot be moved by rotating them: moved from position {here} to {there} they are "
                f"off by {error:.2g} of the largest, which is more than rounding"
            )
        self.is_proved = True

    def _alone(self, request: Request) -> list[list[int]]:
        assert request.blend is not None
        blend, size = request.blend, self._store.chunk_tokens
        return [blend.alone(request.prompt, passage, size) for passage in blend.passages]

    def _at(self, lease: Lease, start: int, stop: int) -> NDArray[np.int64]:
        """The pool's token slots of a lease's positions [start, stop)."""
        positions, size = np.arange(start, stop), self._store.chunk_tokens
        return np.asarray(lease.slots, dtype=np.int64)[positions // size] * size + positions % size
