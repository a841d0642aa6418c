"""The codecs by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from stemcache.prefixtree.codecs.cachegen import CacheGenCodec
from stemcache.prefixtree.codecs.codec import Codec
from stemcache.prefixtree.codecs.eight_bit import Fp8, Int8
from stemcache.prefixtree.codecs.hadamard import Hadamard4
from stemcache.prefixtree.codecs.kivi import Kivi
from stemcache.prefixtree.codecs.lossless import LosslessCodec
from stemcache.prefixtree.codecs.quantised import QuantisedCodec
from stemcache.prefixtree.codecs.raw import RawCodec

_CODECS: Final[dict[str, Callable[[], Codec]]] = {
    "raw": RawCodec,
    "lossless": LosslessCodec,
    "int8": lambda: QuantisedCodec("int8", Int8()),
    "fp8_e4m3": lambda: QuantisedCodec("fp8_e4m3", Fp8(torch.float8_e4m3fn)),
    "fp8_e5m2": lambda: QuantisedCodec("fp8_e5m2", Fp8(torch.float8_e5m2)),
    "q4": lambda: QuantisedCodec("q4", Hadamard4()),
    "kivi4": lambda: QuantisedCodec("kivi4", Kivi(4)),
    "kivi2": lambda: QuantisedCodec("kivi2", Kivi(2)),
    "cachegen": CacheGenCodec,
}
CODEC_NAMES: Final = tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """Return the codec of this name.

    Raises:
        ValueError: there is none, or a library that it needs is not installed.
    """
    if name not in _CODECS:
        raise ValueError(f"unknown codec {name!r}; there are {', '.join(CODEC_NAMES)}")
    return _CODECS[name]()
