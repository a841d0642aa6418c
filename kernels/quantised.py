"""Quantised pool layers: integers per value, a scale per token and head, as the GPU kernel reads them.

Invariant: a token's codes depend on that token alone, so quantised tokens can be appended, and moved between chunks,
like any others. Lossy: whoever uses it says so in the namespace.

8 bits: value = scale * code, code in [-127, 127], scale = max |value| / 127.
4 bits: value = scale * code + zero, code in [0, 15], zero = min, scale = (max - min) / 15; dims 2j and 2j + 1 share
byte j, the even one in the low half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantisedLayer:
    """One layer of a pool.

    codes: int8[2, kv_heads, chunks, chunk_tokens, head_dim], or uint8[..., head_dim / 2] with 4 bits.
    scales: float32[2, kv_heads, chunks, chunk_tokens, 2], (scale, zero); zero is 0 with 8 bits.
    """

    codes: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> torch.Size:
        """That of the layer's values: [2, kv_heads, chunks, chunk_tokens, head_dim]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The values, [2, kv_heads, chunks, chunk_tokens, head_dim], computed in float32 and rounded once."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        scale, zero = self.scales.unsqueeze(-2).unbind(-1)
        return (codes.float() * scale + zero).to(dtype)


def quantise(values: Tensor, bits: int) -> QuantisedLayer:
    """Quantise [2, kv_heads, chunks, chunk_tokens, head_dim] of finite values. Raises ValueError unless bits is 8 or 4.

    Tokens of NaN stay NaN in their scales, so that poisoned slots remain poisoned.
    """
    if bits not in (4, 8) or values.shape[-1] % 2:
        raise ValueError(f"pool layers are quantised to 8 or 4 bits with an even head_dim, not {bits} bits")
    values = values.float()
    if bits == 8:
        scale = values.abs().amax(dim=-1) / 127
        zero = torch.zeros_like(scale)
        limits = (-127, 127)
    else:
        zero = values.amin(dim=-1)
        scale = (values.amax(dim=-1) - zero) / 15
        limits = (0, 15)
    divisor = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    codes = ((values - zero.unsqueeze(-1)) / divisor).round().clamp(*limits).nan_to_num(0.0)
    scales = torch.stack([scale, zero], dim=-1)
    if bits == 8:
        return QuantisedLayer(codes.to(torch.int8), scales)
    even, odd = codes.to(torch.uint8).view(*codes.shape[:-1], -1, 2).unbind(-1)
    return QuantisedLayer((even | odd << 4).contiguous(), scales)
