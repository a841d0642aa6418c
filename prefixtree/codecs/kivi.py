"""KIVI: keys by channel, values by token, 2 or 4 bits (arXiv 2402.02750).

A key's outliers sit in few channels, the same in all tokens, so keys share a range along the tokens of one channel; a
value's do not, so values share one along the channels of one token. A range has a zero point and a step, 16 bits each,
for 32 numbers: 3 or 5 bits a value. The paper's window of recent tokens in full precision is not needed here: a chunk
is quantised once, when it leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from stemcache.prefixtree.codecs.packing import pack_codes, unpack_codes
from stemcache.prefixtree.codecs.quantised import Part
from stemcache.prefixtree.codecs.scales import divide, round_down, round_up
from stemcache.prefixtree.layout import KVLayout

_GROUP: Final = 32


class Kivi:
    """Groups of 32 tokens (16 where a chunk has no more) for keys, of 32 channels for values.

    Error: half a step, which is the group's range / (2**bits - 1).
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def parts(self, layout: KVLayout) -> list[Part]:
        heads = (layout.layers, layout.kv_heads)
        tokens = min(_GROUP, layout.chunk_tokens)
        width = -(-layout.head_dim // _GROUP)
        keys = (*heads, layout.chunk_tokens // tokens, 1, layout.head_dim)
        values = (*heads, layout.chunk_tokens, width, 1)
        key_codes = layout.layers * layout.kv_heads * layout.chunk_tokens * layout.head_dim
        value_codes = layout.layers * layout.kv_heads * layout.chunk_tokens * width * _GROUP
        return [
            *[(keys, torch.bfloat16)] * 2,
            ((key_codes * self._bits // 8,), torch.uint8),
            *[(values, torch.bfloat16)] * 2,
            ((value_codes * self._bits // 8,), torch.uint8),
        ]

    def quantise(self, values: Tensor) -> list[Tensor]:
        layers, _, kv_heads, n_tokens, head_dim = values.shape
        by_channel = values[:, 0].reshape(layers, kv_heads, -1, min(_GROUP, n_tokens), head_dim)
        fill = -head_dim % _GROUP
        by_token = pad(values[:, 1].flatten(0, 1), (0, fill), mode="replicate") if fill else values[:, 1]
        by_token = by_token.reshape(layers, kv_heads, n_tokens, -1, _GROUP)
        return [*self._codes(by_channel, axis=3), *self._codes(by_token, axis=4)]

    def restore(self, parts: Sequence[Tensor], layout: KVLayout) -> Tensor:
        tokens = min(_GROUP, layout.chunk_tokens)
        keys = self._numbers(parts[:3], (layout.chunk_tokens // tokens, tokens, layout.head_dim)).flatten(2, 3)
        values = self._numbers(parts[3:], (layout.chunk_tokens, -1, _GROUP)).flatten(3, 4)
        return torch.stack([keys, values[..., : layout.head_dim]], dim=1)

    def _codes(self, groups: Tensor, axis: int) -> list[Tensor]:
        """Return zero points, steps and codes of groups that lie along `axis`."""
        levels = 2**self._bits - 1
        zero = round_down(groups.amin(axis, keepdim=True))
        step = round_up((groups.amax(axis, keepdim=True) - zero.float()) / levels)
        codes = divide(groups - zero.float(), step).round_().clamp_(0, levels)
        return [zero, step, pack_codes(codes.nan_to_num_(0).to(torch.uint8).flatten(), self._bits)]

    def _numbers(self, parts: Sequence[Tensor], shape: tuple[int, int, int]) -> Tensor:
        zero, step, packed = parts
        codes = unpack_codes(packed, self._bits).view(*zero.shape[:2], *shape)
        return codes.float().mul_(step.float()).add_(zero.float())
