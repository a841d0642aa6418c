"""Packing: codes of 2 or 4 bits into bytes.

The first code of a byte, in its lowest bits, comes from the first half (or quarter) of the codes, the next from the
next: each step is one operation on contiguous memory, where neighbours in one byte would need strides.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
