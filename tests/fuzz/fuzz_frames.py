"""Fuzzes what reads stored bytes: frames and codecs, guided by coverage (atheris).

    python tests/fuzz/fuzz_frames.py -max_total_time=300        libFuzzer's options; `make fuzz`

The fuzzer's bytes are used as they are, as a header that is rightly sealed, as an undamaged frame's sections, and as
changes of a good frame: a seal that guards all else from random bytes would guard it from the fuzzer too. Only a chunk
or a FrameError may come out; ten seconds for one input, or 2 GB in all, end the run as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(include=["stemcache.prefixtree", "msgpack"]):
    import torch

    from stemcache.prefixtree import frame as frame_module
    from stemcache.prefixtree.chunk_frames import pack_chunks, unpack_chunks
    from stemcache.prefixtree.codecs.registry import CODEC_NAMES, get_codec
    from stemcache.prefixtree.errors import FrameError
    from stemcache.prefixtree.frame import FrameHeader, pack, unpack
    from stemcache.prefixtree.layout import KVLayout
    from stemcache.prefixtree.namespace import Namespace

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=5, dtype="bfloat16", chunk_tokens=16)
NAMESPACE = Namespace.of(model="m", dtype="bfloat16")
CODECS = [get_codec(name) for name in CODEC_NAMES]
CHUNK = torch.randn(LAYOUT.chunk_shape, generator=torch.Generator().manual_seed(0)).bfloat16()
HEADERS = [FrameHeader(codec.name, LAYOUT, NAMESPACE, NAMESPACE.digest, bytes(64)) for codec in CODECS]
FRAMES = [pack_chunks(header, [CHUNK], codec) for header, codec in zip(HEADERS, CODECS, strict=True)]


def as_it_is(data: atheris.FuzzedDataProvider, i: int) -> bytes:
    """The fuzzer's bytes."""
    return bytes(data.ConsumeBytes(sys.maxsize))


def as_a_header(data: atheris.FuzzedDataProvider, i: int) -> bytes:
    """A frame whose header is the fuzzer's bytes, rightly sealed."""
    text = bytes(data.ConsumeBytes(sys.maxsize))
    digest = HEADERS[i].digest
    head = FRAMES[i][:10] + len(text).to_bytes(4, "big") + digest + text
    return head + frame_module._seal(None, digest, head)


def as_sections(data: atheris.FuzzedDataProvider, i: int) -> bytes:
    """A whole frame around the fuzzer's bytes: what a hostile writer stores."""
    n_levels = data.ConsumeIntInRange(1, 4)
    sections = [[bytes(data.ConsumeBytes(data.ConsumeIntInRange(0, 600)))] for _ in range(n_levels - 1)]
    return pack(HEADERS[i], [*sections, [bytes(data.ConsumeBytes(sys.maxsize))]])


def as_changed_sections(data: atheris.FuzzedDataProvider, i: int) -> bytes:
    """A good chunk's sections with a few bytes changed, in a whole frame."""
    levels = [bytearray(level) for level in CODECS[i].encode(CHUNK)]
    for _ in range(data.ConsumeIntInRange(1, 8)):
        level = data.PickValueInList(levels)
        if level:
            level[data.ConsumeIntInRange(0, len(level) - 1)] = data.ConsumeIntInRange(0, 255)
    return pack(HEADERS[i], [[level] for level in levels])


def as_a_changed_frame(data: atheris.FuzzedDataProvider, i: int) -> bytes:
    """A good frame with a few bytes changed or its end cut off."""
    frame = bytearray(FRAMES[i])
    for _ in range(data.ConsumeIntInRange(0, 4)):
        frame[data.ConsumeIntInRange(0, len(frame) - 1)] = data.ConsumeIntInRange(0, 255)
    return bytes(frame[: data.ConsumeIntInRange(0, len(frame))])


SHAPES: list[Callable[[atheris.FuzzedDataProvider, int], bytes]] = [
    as_it_is,
    as_a_header,
    as_sections,
    as_changed_sections,
    as_a_changed_frame,
]


def run(raw: bytes) -> None:
    """One input: unpack it, and decode it."""
    data = atheris.FuzzedDataProvider(raw)
    i = data.ConsumeIntInRange(0, len(CODECS) - 1)
    fewer = data.ConsumeBool()
    shape = data.PickValueInList(SHAPES)
    frame = shape(data, i)
    digest = HEADERS[i].digest
    try:
        unpack(frame, digest, allow_fewer_levels=fewer)
        (chunk,) = unpack_chunks(frame, digest, CODECS[i], layout=LAYOUT, namespace=NAMESPACE, allow_fewer_levels=fewer)
    except FrameError:
        return
    assert chunk.shape == LAYOUT.chunk_shape
    if CODECS[i].is_exact and shape is as_a_changed_frame:
        assert torch.equal(chunk.view(torch.uint8), CHUNK.view(torch.uint8)), "a damaged frame passed for a whole one"


if __name__ == "__main__":
    torch.set_num_threads(1)
    atheris.Setup([*sys.argv, "-rss_limit_mb=2048", "-timeout=10"], run)
    atheris.Fuzz()
