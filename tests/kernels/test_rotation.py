"""Moved tokens: their keys are those of the new position, in both forms, wherever they go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stemcache.kernels.rotation import Move, move_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THETA = 10_000.0


@pytest.fixture(params=["torch", "triton"])
def backend(request: Any) -> str:
    if request.param == "triton":
        pytest.importorskip("triton", reason="the GPU kernels need Triton: pip install 'stemcache[gpu]'")
    return str(request.param)


def rope(key: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotated by halves, as transformers does it, in float64: key [..., n, d] at positions [n]."""
    half = len(frequencies)
    angle = positions[:, None].double() * frequencies.double()
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = key.double().split([half, half, key.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotary"), [(torch.float32, 16, 16), (torch.float16, 24, 8), (torch.bfloat16, 96, 96)]
)
def test_moved_keys_are_those_of_the_new_position(backend: str, dtype: torch.dtype, head_dim: int, rotary: int) -> None:
    """Two documents, neither whole chunks, one moved on by far and one back, and one turned in place."""
    generator = torch.Generator().manual_seed(0)
    frequencies = THETA ** (-torch.arange(0, rotary, 2).double() / rotary)
    plain = torch.randn(2, 2, 3, 8 * 16, head_dim, generator=generator)
    positions = torch.arange(128) * 3
    moves = [
        Move(np.arange(5, 26), np.arange(70, 91), 70_001),
        Move(np.arange(30, 37), np.array([127, 40, 99, 3, 2, 111, 64]), -17),
        Move(np.arange(48, 53), np.arange(48, 53), 9),
    ]
    pool = plain.clone()
    pool[:, 0] = rope(plain[:, 0], positions, frequencies).float()
    pool = pool.to(dtype).view(2, 2, 3, 8, 16, head_dim)
    expected = pool.flatten(3, 4).double()
    for move in moves:
        source, target = torch.from_numpy(move.source), torch.from_numpy(move.target)
        shifted = positions[source] + move.shift
        expected[:, 0][:, :, target] = rope(plain[:, 0][:, :, source], shifted, frequencies)
        expected[:, 1][:, :, target] = pool.flatten(3, 4)[:, 1][:, :, source].double()
    moved = pool.to(DEVICE)
    move_tokens(moved, moves, frequencies, backend=backend)
    actual = moved.flatten(3, 4).cpu()
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (actual[:, 0] - expected[:, 0]).abs().max() <= 2 * rounding * expected.abs().max()
    assert torch.equal(actual[:, 1].double(), expected[:, 1]), "values are copied as they are"
    untouched = np.setdiff1d(np.arange(128), np.concatenate([move.target for move in moves]))
    assert torch.equal(actual[..., untouched, :], pool.flatten(3, 4)[..., untouched, :])


def test_bad_moves_are_refused() -> None:
    pool = torch.zeros(1, 2, 1, 2, 16, 8)
    frequencies = torch.ones(4)
    a, b = np.arange(0, 4), np.arange(8, 12)
    for match, moves in {
        "outside the pool": [Move(a, b + 24, 1)],
        "to one slot": [Move(a, b, 1), Move(a + 16, b, 1)],
        "free slots": [Move(a, a + 1, 1)],
        "4 tokens|of \\(4,\\) tokens": [Move(a, b[:2], 1)],
    }.items():
        with pytest.raises(ValueError, match=match):
            move_tokens(pool, moves, frequencies)
    with pytest.raises(ValueError, match="do not fit keys"):
        move_tokens(pool, [Move(a, b, 1)], torch.ones(5))
    with pytest.raises(ValueError, match="contiguous"):
        move_tokens(pool[0], [Move(a, b, 1)], frequencies)
    with pytest.raises(ValueError, match="unknown backend"):
        move_tokens(pool, [Move(a, b, 1)], frequencies, backend="tpu")
    move_tokens(pool, [], frequencies)
