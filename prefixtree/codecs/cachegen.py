"""CacheGen: bins by layer, a distribution for each channel, an entropy coder, and levels (arXiv 2310.07240).

A value is a number of bins of its token's largest magnitude. Early layers, whose errors go through all the others, have
finer bins: LMCache's choice, 33 for the keys of the first third of the layers and for the values of the first two, 15
elsewhere. Keys lose their channel's mean first; the paper takes differences to an anchor token for the same reason.

Three levels refine each other: the first says in which coarse bin a value lies (11 or 5 of them), each further one in
which third of it, so that LMCache's bins are the second. A reader on a slow link can stop after any. Only the first is
entropy coded: the thirds of a bin are so nearly equally likely that coding them saved 0 to 6 % at a tenth of the speed.

Channels are told apart by their spread, in 16 classes, and each class brings the histogram of its symbols. A histogram
for each channel, as in the paper, is made beforehand for a model; within a chunk of 64 tokens it would be larger than
what it describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stemcache.prefixtree.codecs.codec import tensor_of, torch_dtype
from stemcache.prefixtree.codecs.entropy import EntropyCoder
from stemcache.prefixtree.codecs.packing import pack_codes, pack_thirds, unpack_codes, unpack_thirds
from stemcache.prefixtree.codecs.quantised import (
    Part,
    as_it_is,
    cut_parts,
    join_parts,
    read_as_it_is,
    read_sinks,
    sink_bytes,
    with_sinks,
    without_sinks,
)
from stemcache.prefixtree.codecs.scales import divide, round_up
from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.frame import Buffer
from stemcache.prefixtree.layout import KVLayout

_N_CLASSES: Final = 16
_N_LEVELS: Final = 3
_FINE, _COARSE = 5, 2  # bins of the first level on either side of zero
# All levels, scales and histograms included, as `benchmarks/codecs.py` found on SmolLM2-135M's shape.
_TYPICAL_BITS: Final = 5.0


class CacheGenCodec:
    """See `Codec`. Error: the token's scale / bins; by level 11, 33 and 99 in finer layers, 5, 15 and 45 in others.

    Format of the first level: the byte and the sinks as in `quantised.py`, the tensors of `_side_parts`, the coded
    bins. Of the others: thirds, five to a byte; nothing where the chunk is stored as it is.

    Raises:
        ValueError: constriction is not installed.
    """

    name = "cachegen"
    is_exact = False
    is_identity = False

    def __init__(self) -> None:
        self._coder = EntropyCoder(_N_CLASSES, 2 * _FINE + 1)

    def bits_per_value(self, layout: KVLayout) -> float:
        return _TYPICAL_BITS

    def encode(self, chunk: Tensor, *, sinks: int = 0) -> list[Buffer]:
        values = without_sinks(chunk, sinks)
        mean_scale = round_up(values[:, 0].mean(2).abs().amax(-1) / 127)
        means = divide(values[:, 0].mean(2), mean_scale[..., None]).round_().nan_to_num_(0).to(torch.int8)
        values[:, 0] -= _means(mean_scale, means)
        scale = round_up(values.abs().amax((2, 4)))
        if not bool(values.isfinite().all() & scale.isfinite().all() & mean_scale.isfinite().all()):
            return [as_it_is(chunk), b"", b""]
        bins = _bins(chunk.shape[0])
        fine = divide(values, scale[:, :, None, :, None]).mul_(bins * 9 / 2).add_(0.5).floor_()
        limit = (9 * bins - 1) / 2
        fine = fine.clamp_(-limit, limit).to(torch.int32).transpose(3, 4).flatten(0, 3)  # [channels, tokens]
        classes = _classes_by_spread(fine)
        middle = (fine + 1).div(3, rounding_mode="floor")
        coarse = (middle + 1).div(3, rounding_mode="floor")
        thirds = (middle - 3 * coarse + 1, fine - 3 * middle + 1)
        side = join_parts([mean_scale, means, scale, pack_codes(classes, 4)])
        bins_coded = self._coder.encode(_split(coarse + _FINE, classes))
        first = b"".join([b"\0", sink_bytes(chunk, sinks), side, bins_coded])
        return [first, *(join_parts([pack_thirds(third.to(torch.uint8))]) for third in thirds)]

    def decode(self, levels: Sequence[Buffer], layout: KVLayout, *, sinks: int = 0) -> Tensor:
        if not 1 <= len(levels) <= _N_LEVELS:
            raise FrameError("payload", f"{len(levels)} levels where 1 to {_N_LEVELS} belong")
        first, *others = (memoryview(level).cast("B") for level in levels)
        if (chunk := read_as_it_is(first, layout)) is not None:
            if any(len(other) for other in others):
                raise FrameError("payload", "a level refines a chunk that is stored as it is")
            return chunk
        kept, data = read_sinks(first, layout, sinks)
        (mean_scale, means, scale, packed), data = cut_parts(data, _side_parts(layout))
        classes = unpack_codes(packed, 4)
        numbers = self._read_bins(data, classes, layout)
        for other in others:
            numbers = numbers.mul_(3).add_(_read_thirds(other, numbers)).sub_(1)
        shape = (layout.layers, 2, layout.kv_heads, layout.head_dim, layout.chunk_tokens)
        step = 2 / (_bins(layout.layers) * 3 ** len(others)) * scale.float()[:, :, None, :, None]
        values = numbers.float().view(shape).transpose(3, 4) * step
        values[:, 0] += _means(mean_scale, means)
        return with_sinks(values, kept, torch_dtype(layout))

    def _read_bins(self, data: memoryview, classes: Tensor, layout: KVLayout) -> Tensor:
        """Return the first level's bins, int32 `[channels, tokens]`, 0 in the middle."""
        sizes = torch.bincount(classes, minlength=_N_CLASSES) * layout.chunk_tokens
        by_class = self._coder.decode(data, sizes.tolist())
        symbols = torch.empty(len(classes), layout.chunk_tokens, dtype=torch.int32)
        symbols[_by_class(classes)] = torch.from_numpy(np.concatenate(by_class)).view(-1, layout.chunk_tokens)
        return symbols.sub_(_FINE)


def _read_thirds(level: memoryview, numbers: Tensor) -> Tensor:
    """Return a further level's thirds, 0 to 2, in the shape of the numbers that they refine."""
    packed = tensor_of(level, (-(-numbers.numel() // 5),), torch.uint8)
    return unpack_thirds(packed, numbers.numel()).view(numbers.shape)


def _side_parts(layout: KVLayout) -> list[Part]:
    """What the first level holds besides symbols: means of the keys' channels, a scale a token, a class a channel."""
    layers, _, kv_heads, n_tokens, head_dim = layout.chunk_shape
    return [
        ((layers, kv_heads), torch.bfloat16),
        ((layers, kv_heads, head_dim), torch.int8),
        ((layers, 2, n_tokens), torch.bfloat16),
        ((layers * kv_heads * head_dim,), torch.uint8),
    ]


def _means(scale: Tensor, codes: Tensor) -> Tensor:
    """The means of the keys' channels, `[layers, kv_heads, 1, head_dim]`."""
    return (codes.float() * scale.float()[..., None])[:, :, None]


def _bins(n_layers: int) -> Tensor:
    """The bins of the first level, float32 `[layers, 2, 1, 1, 1]`; an odd number, so that zero has one of its own."""
    half = torch.full((n_layers, 2), _COARSE)
    half[: -(-n_layers // 3), 0] = _FINE
    half[:2, 1] = _FINE
    return (2 * half + 1).float().view(n_layers, 2, 1, 1, 1)


def _classes_by_spread(numbers: Tensor) -> Tensor:
    """Return each channel's class, uint8[channels]: equally many channels in each, those of like spread together."""
    spread = numbers.abs().sum(1)
    ranks = torch.empty_like(spread)
    ranks[spread.argsort(stable=True)] = torch.arange(len(spread))
    return (ranks * _N_CLASSES // len(spread)).to(torch.uint8)


def _by_class(classes: Tensor) -> Tensor:
    """The channels in order of their class."""
    return classes.argsort(stable=True)


def _split(symbols: Tensor, classes: Tensor) -> list[NDArray[np.int32]]:
    """Return the symbols `[channels, tokens]` class by class, each in one dimension."""
    ends = torch.bincount(classes, minlength=_N_CLASSES).cumsum(0)
    return [part.flatten().numpy() for part in symbols[_by_class(classes)].tensor_split(ends[:-1])]
