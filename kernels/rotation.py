"""Moving tokens to other positions: their keys are rotated from the old position's angle to the new one's.

Invariant: with k = R(p) u, R a rotation, R(q - p) k = R(q) u exactly (arXiv 2104.09864, section 3.2.2); what is lost
is one rounding to the pool's dtype. A sine and a cosine are taken in float64 of the exact product, so that a move of
100,000 positions is as exact as one of ten. A move whose tables carry an attention scaling (YaRN) keeps it: it is in
u already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Tokens in the slots `source` go to the slots `target`, `shift` positions further on (or back).

    source, target: integers[n], slots are `chunk id * chunk_tokens + offset`; they may lie anywhere, whole chunks or
    not.
    """

    source: NDArray[np.integer]
    target: NDArray[np.integer]
    shift: int


def move_tokens(pool: Tensor, moves: Sequence[Move], inverse_frequencies: Tensor, *, backend: str = "auto") -> None:
    """Copy tokens within the pool, in all layers, with their keys rotated; values as they are.

    pool: [layers, 2, kv_heads, chunks, chunk_tokens, head_dim], contiguous; keys as transformers stores them,
    rotated by
        halves: dims j and j + r turn together, r = len(inverse_frequencies), and those from 2r on are not rotated.
    inverse_frequencies: [r], the model's `inv_freq`, in radians a position.
    backend: "triton", "torch", or "auto", which takes Triton where the pool is on a GPU.
    Raises ValueError for slots outside the pool, targets named twice, and a token that is read by one move and
    overwritten by another: GPU programs run in no order. In place (source equal to target) is allowed.
    """
    slots = _check(pool, moves, inverse_frequencies)
    if slots is None:
        return
    source, target, turn = slots
    shifts = torch.tensor([move.shift for move in moves], dtype=torch.float64)
    angles = shifts[:, None] * inverse_frequencies.detach().cpu().double()
    device = pool.device
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
    old, new, index = (torch.from_numpy(part.astype(np.int32)).to(device) for part in (source, target, turn))
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        from stemcache.kernels.attention import triton_backend  # an extra: imported where it is used

        triton_backend().rotate(pool, old, new, index, cos, sin)
    elif backend in ("auto", "torch"):
        _move(pool, old, new, index, cos, sin)
    else:
        raise ValueError(f"unknown backend {backend!r}: choose auto, torch or triton")


def _move(pool: Tensor, source: Tensor, target: Tensor, turn: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[1]
    flat = pool.view(*pool.shape[:3], -1, pool.shape[5])
    moved = flat.index_select(3, source)
    first, second = moved[:, 0, ..., :half].float(), moved[:, 0, ..., half : 2 * half].float()
    c, s = cos[turn], sin[turn]
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    moved[:, 0, ..., : 2 * half] = turned.to(pool.dtype)
    flat.index_copy_(3, target.long(), moved)


def _check(pool: Tensor, moves: Sequence[Move], inverse_frequencies: Tensor) -> tuple[Ints, Ints, Ints] | None:
    """All moves' sources, targets and the index of each token's move; None if there is no token."""
    if pool.dim() != 6 or pool.shape[1] != 2 or not pool.is_contiguous():
        raise ValueError(
            "a pool must be a contiguous [layers, 2, kv_heads, chunks, chunk_tokens, head_dim] tensor, "
            f"got {tuple(pool.shape)}"
        )
    if inverse_frequencies.dim() != 1 or not 0 < 2 * len(inverse_frequencies) <= pool.shape[5]:
        raise ValueError(f"{tuple(inverse_frequencies.shape)} frequencies do not fit keys of {pool.shape[5]} values")
    for move in moves:
        if move.source.shape != move.target.shape or move.source.ndim != 1:
            raise ValueError(f"a move of {move.source.shape} tokens to {move.target.shape} slots")
    if not sum(len(move.source) for move in moves):
        return None
    source = np.concatenate([move.source for move in moves]).astype(np.int64)
    target = np.concatenate([move.target for move in moves]).astype(np.int64)
    turn = np.repeat(np.arange(len(moves)), [len(move.source) for move in moves])
    slots = pool.shape[3] * pool.shape[4]
    if min(source.min(), target.min()) < 0 or max(source.max(), target.max()) >= slots:
        raise ValueError(f"a move names slots outside the pool's {slots}")
    if len(np.unique(target)) != len(target):
        raise ValueError("two tokens are moved to one slot")
    if np.isin(source[source != target], target).any() or np.isin(target[source != target], source).any():
        raise ValueError("a token is read by one move and overwritten by another: move it through free slots")
    return source, target, turn
