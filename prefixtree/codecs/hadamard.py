"""Four bits a value after a Hadamard transform of 32 neighbours: ExLlamaV2's Q4 form, 4.5 bits with its scales.

The transform spreads a channel's outlier over its 32 neighbours, so that one scale fits all of them. The 16 levels lie
half a step off zero, -7.5 to 7.5 steps: ExLlamaV2's -8 to 7 cuts the largest positive number by an eighth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from stemcache.prefixtree.codecs.packing import pack_codes, unpack_codes
from stemcache.prefixtree.codecs.quantised import Part
from stemcache.prefixtree.codecs.scales import divide, round_up
from stemcache.prefixtree.layout import KVLayout

_GROUP: Final = 32


class Hadamard4:
    """Groups of 32 along head_dim, which is filled up with zeros.

    Error: half a step in each transformed value, so in the 32 values together, as a Euclidean length, at most
    sqrt(32) / 16 of the largest transformed magnitude.
    """

    def parts(self, layout: KVLayout) -> list[Part]:
        groups = (*layout.chunk_shape[:-1], -(-layout.head_dim // _GROUP))
        n_codes = layout.layers * 2 * layout.kv_heads * layout.chunk_tokens * groups[-1] * _GROUP
        return [(groups, torch.bfloat16), ((n_codes // 2,), torch.uint8)]

    def quantise(self, values: Tensor) -> list[Tensor]:
        filled = pad(values, (0, -values.shape[-1] % _GROUP))
        groups = filled.view(*values.shape[:-1], -1, _GROUP) @ _hadamard()
        step = round_up(groups.abs().amax(-1) / 8)
        codes = divide(groups, step[..., None]).floor_().add_(8).clamp_(0, 15)
        return [step, pack_codes(codes.nan_to_num_(0).to(torch.uint8).flatten(), 4)]

    def restore(self, parts: Sequence[Tensor], layout: KVLayout) -> Tensor:
        step, packed = parts
        groups = unpack_codes(packed, 4).float().sub_(7.5).view(*step.shape, _GROUP).mul_(step.float()[..., None])
        values = (groups @ _hadamard()).reshape(*layout.chunk_shape[:-1], -1)
        return values.narrow(-1, 0, layout.head_dim)


def _hadamard() -> Tensor:
    """The 32 x 32 matrix of +-1 by Sylvester's doubling, divided by sqrt(32): its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < _GROUP:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(_GROUP)
