"""Scales: the 16-bit numbers that say how large a group's codes are.

Invariant: a scale is never smaller than what it was made from, nor a zero point larger, so that codes computed with the
rounded numbers stay on their grid and the error stays within half a step. bfloat16, because float16 ends at 65,504 and
loses digits below 0.00006, and values in a chunk may lie anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_down(values: Tensor) -> Tensor:
    """Return the largest bfloat16 numbers that are not larger than these float32 numbers."""
    bits = values.float().contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits + 0xFFFF, bits) & ~0xFFFF  # dropping bits moves towards zero
    return bits.view(torch.float32).bfloat16()


def round_up(values: Tensor) -> Tensor:
    """Return the smallest bfloat16 numbers that are not smaller than these float32 numbers."""
    return -round_down(-values)


def divide(values: Tensor, scale: Tensor) -> Tensor:
    """Return values / scale; 0 where the scale is: there, all values of the group are below 1e-42."""
    return values / torch.where(scale > 0, scale.float(), torch.inf)
