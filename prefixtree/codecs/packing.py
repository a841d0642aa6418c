"""Packing: codes of 2 or 4 bits into bytes, and codes below three, five to a byte.

The first code of a byte, in its lowest place, comes from the first half (quarter, fifth) of the codes, the next from
the next: each step is one operation on contiguous memory, where neighbours in one byte would need strides.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the codes, uint8 below 2**bits and a multiple of `8 // bits` many, as uint8[n * bits // 8]."""
    blocks = codes.reshape(8 // bits, -1)
    packed = blocks[0].clone()
    for i, block in enumerate(blocks[1:], 1):
        packed |= block << (bits * i)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of `pack_codes`, uint8, in one dimension."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> (bits * i)) & mask for i in range(8 // bits)]).flatten()


def pack_thirds(codes: Tensor) -> Tensor:
    """Return the codes, uint8 below 3, as uint8[ceil(n / 5)]: 1.6 bits each, of which 1.585 are needed."""
    flat = codes.flatten()
    blocks = pad(flat, (0, -len(flat) % 5)).view(5, -1)
    packed = blocks[0].clone()
    for i, block in enumerate(blocks[1:], 1):
        packed += block * 3**i
    return packed


def unpack_thirds(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` codes of `pack_thirds`, uint8. Bytes above 242, which it never makes, give any codes."""
    blocks = []
    for _ in range(5):
        blocks.append(packed % 3)
        packed = packed // 3
    return torch.stack(blocks).flatten()[:count]
