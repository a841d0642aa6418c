"""The codecs by name."""

from __future__ import annotations

from typing import Final

from stemcache.prefixtree.codecs.codec import Codec
from stemcache.prefixtree.codecs.lossless import LosslessCodec
from stemcache.prefixtree.codecs.raw import RawCodec

_CODECS: Final[dict[str, type[Codec]]] = {"raw": RawCodec, "lossless": LosslessCodec}
CODEC_NAMES: Final = tuple(_CODECS)


def get_codec(name: str) -> Codec:
    """Return the codec of this name.

    Raises:
        ValueError: there is none, or a library that it needs is not installed.
    """
    if name not in _CODECS:
        raise ValueError(f"unknown codec {name!r}; there are {', '.join(CODEC_NAMES)}")
    return _CODECS[name]()
