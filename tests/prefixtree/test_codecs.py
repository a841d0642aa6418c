"""Codecs: exact ones give the very bits back, lossy ones stay within their bounds, and no bytes do harm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stemcache.prefixtree.chunk_frames import group_chunks, pack_chunks, unpack_chunks
from stemcache.prefixtree.codecs.codec import torch_dtype
from stemcache.prefixtree.codecs.registry import CODEC_NAMES, get_codec
from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.frame import FrameHeader, pack
from stemcache.prefixtree.layout import DTYPE_BYTES, KVLayout
from stemcache.prefixtree.namespace import Namespace

LAYOUTS = {
    "small": KVLayout(layers=2, kv_heads=1, head_dim=5, dtype="float32", chunk_tokens=16),
    "odd": KVLayout(layers=3, kv_heads=3, head_dim=80, dtype="bfloat16", chunk_tokens=32),
    "half": KVLayout(layers=2, kv_heads=2, head_dim=64, dtype="float16", chunk_tokens=64),
    "wide": KVLayout(layers=1, kv_heads=1, head_dim=576, dtype="bfloat16", chunk_tokens=16),
}
EXACT = [name for name in CODEC_NAMES if get_codec(name).is_exact]


def random_chunk(layout: KVLayout, seed: int = 0) -> Tensor:
    """Numbers like a model's: keys with a mean and a size of their own for each channel, values without."""
    generator = torch.Generator().manual_seed(seed)
    chunk = torch.randn(layout.chunk_shape, generator=generator)
    per_channel = (layout.layers, layout.kv_heads, 1, layout.head_dim)
    chunk[:, 0] *= torch.exp(0.7 * torch.randn(per_channel, generator=generator))
    chunk[:, 0] += 1.5 * torch.randn(per_channel, generator=generator)
    return chunk.to(torch_dtype(layout))


def bits(chunk: Tensor) -> Tensor:
    return chunk.contiguous().view(torch.uint8)


def adversarial_chunks(layout: KVLayout) -> dict[str, Tensor]:
    """What no model computes, and a store must survive."""
    dtype = torch_dtype(layout)
    limits = torch.finfo(dtype)
    chunk = random_chunk(layout)
    special = chunk.clone()
    for i, value in enumerate([float("nan"), float("inf"), float("-inf"), limits.max, limits.tiny, 0.0, -0.0]):
        special.view(-1)[i::17] = value
    size = chunk.numel() * chunk.itemsize
    any_bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {
        "zeros": torch.zeros_like(chunk),
        "minus zeros": -torch.zeros_like(chunk),
        "huge": torch.full_like(chunk, limits.max),
        "denormal": torch.full_like(chunk, limits.tiny / 4),
        "nan": torch.full_like(chunk, float("nan")),
        "infinite": torch.full_like(chunk, float("-inf")),
        "special": special,
        "any bits": any_bits.view(dtype).view(layout.chunk_shape),
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_codecs_give_the_very_bits_back(name: str, layout: KVLayout) -> None:
    codec = get_codec(name)
    for what, chunk in {"random": random_chunk(layout), **adversarial_chunks(layout)}.items():
        decoded = codec.decode(codec.encode(chunk), layout)
        assert decoded.dtype == chunk.dtype
        assert decoded.shape == chunk.shape
        assert decoded.is_contiguous()
        assert torch.equal(bits(decoded), bits(chunk)), what


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(EXACT),
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 70),
    dtype=st.sampled_from(list(DTYPE_BYTES)),
    data=st.data(),
)
def test_exact_codecs_on_any_layout(
    name: str, layers: int, kv_heads: int, head_dim: int, dtype: str, data: st.DataObject
) -> None:
    layout = KVLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, chunk_tokens=16)
    pattern = torch.frombuffer(bytearray(data.draw(st.binary(min_size=1, max_size=64))), dtype=torch.uint8)
    repeated = pattern.repeat(-(-layout.bytes_per_chunk // len(pattern)))[: layout.bytes_per_chunk]
    chunk = repeated.view(torch_dtype(layout)).view(layout.chunk_shape)
    codec = get_codec(name)
    assert torch.equal(bits(codec.decode(codec.encode(chunk), layout)), bits(chunk))


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_any_strides_may_be_encoded(name: str) -> None:
    layout = LAYOUTS["odd"]
    chunk = random_chunk(layout)
    strided = chunk.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    codec = get_codec(name)
    assert [bytes(level) for level in codec.encode(strided)] == [bytes(level) for level in codec.encode(chunk)]


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_wrong_sizes_are_a_frame_error(name: str) -> None:
    """Truncated at every place of the beginning and the end, longer, empty, no level, or a level too many."""
    layout = LAYOUTS["small"]
    codec = get_codec(name)
    levels = [bytes(level) for level in codec.encode(random_chunk(layout))]
    (first, *others) = levels
    cuts = {*range(min(300, len(first))), *range(max(0, len(first) - 40), len(first))}
    wrong = [[], [b""], [*levels, b""], [first + b"\0", *others], *([first[:cut], *others] for cut in sorted(cuts))]
    for data in wrong:
        with pytest.raises(FrameError) as caught:
            codec.decode(data, layout)
        assert caught.value.reason == "payload"


@pytest.mark.parametrize("name", CODEC_NAMES)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_a_chunk_or_a_frame_error(name: str, data: st.DataObject) -> None:
    """The frame's seal comes first; a codec must stand what a writer with our format, and bad intent, could store."""
    layout = LAYOUTS["small"]
    codec = get_codec(name)
    level = bytearray(codec.encode(random_chunk(layout))[0])
    for _ in range(data.draw(st.integers(1, 4))):
        level[data.draw(st.integers(0, len(level) - 1))] = data.draw(st.integers(0, 255))
    for damaged in (level, data.draw(st.binary(max_size=600))):
        refusal, chunk = None, None
        try:
            chunk = codec.decode([bytes(damaged)], layout)
        except FrameError as error:
            refusal = error
        if chunk is None:
            assert refusal is not None
            assert refusal.reason == "payload"
            assert refusal.__suppress_context__ or refusal.__context__ is None
        else:
            assert chunk.shape == layout.chunk_shape


def test_lossless_saves_what_it_says() -> None:
    layout = KVLayout(layers=4, kv_heads=3, head_dim=64, dtype="bfloat16")
    codec = get_codec("lossless")
    (level,) = codec.encode(random_chunk(layout))
    assert 0.6 < len(level) / layout.bytes_per_chunk < 0.75
    assert codec.bits_per_value(layout) == pytest.approx(16 * len(level) / layout.bytes_per_chunk, rel=0.1)


def test_a_plane_that_says_it_is_huge_takes_no_memory() -> None:
    """zstd's frame carries the decompressed size; ours does not believe it."""
    layout = LAYOUTS["small"]
    (level,) = get_codec("lossless").encode(torch.zeros(layout.chunk_shape))
    big = replace(layout, layers=20_000)
    (bomb,) = get_codec("lossless").encode(torch.zeros(big.chunk_shape))
    assert len(bytes(bomb)) < 4000
    with pytest.raises(FrameError, match="does not decompress to"):
        get_codec("lossless").decode([bomb], layout)
    with pytest.raises(FrameError, match="does not decompress to"):
        get_codec("lossless").decode([level], big)


def test_unknown_codecs_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown codec 'zip'; there are raw, lossless"):
        get_codec("zip")


NAMESPACE = Namespace.of(model="m", dtype="float32")


def header_of(layout: KVLayout, n_chunks: int, codec: str, parent: bytes = NAMESPACE.digest) -> FrameHeader:
    return FrameHeader(codec, layout, NAMESPACE, parent, bytes(range(4)) * layout.chunk_tokens * n_chunks)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", EXACT)
def test_groups_of_chunks_through_a_frame(name: str, layout: KVLayout) -> None:
    chunks = [random_chunk(layout, seed) for seed in range(3)]
    header, codec = header_of(layout, 3, name), get_codec(name)
    data = pack_chunks(header, chunks, codec, secret=b"s")
    found = unpack_chunks(data, header.digest, codec, layout=layout, namespace=NAMESPACE, secret=b"s")
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, chunks, strict=True))


def test_a_frame_of_another_codec_or_of_a_wrong_payload_is_refused() -> None:
    layout = LAYOUTS["small"]
    header = header_of(layout, 1, "raw")
    expected = {"layout": layout, "namespace": NAMESPACE}
    data = pack_chunks(header, [random_chunk(layout)], get_codec("raw"))
    with pytest.raises(FrameError, match="not encoded with lossless"):
        unpack_chunks(data, header.digest, get_codec("lossless"), **expected)  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="1280 belong"):
        unpack_chunks(pack(header, [[b"short"]]), header.digest, get_codec("raw"), **expected)  # type: ignore[arg-type]


def test_chunks_must_be_what_the_header_says() -> None:
    layout = LAYOUTS["small"]
    chunk, raw = random_chunk(layout), get_codec("raw")
    with pytest.raises(ValueError, match="is not of KVLayout"):
        pack_chunks(header_of(layout, 1, "raw"), [chunk.bfloat16()], raw)
    with pytest.raises(ValueError, match="is not of KVLayout"):
        pack_chunks(header_of(layout, 1, "raw"), [chunk[:1]], raw)
    with pytest.raises(ValueError, match="levels of 2 chunks"):
        pack_chunks(header_of(layout, 2, "raw"), [chunk], raw)
    with pytest.raises(ValueError, match="names the codec lossless"):
        pack_chunks(header_of(layout, 1, "lossless"), [chunk], raw)


@pytest.mark.parametrize(
    ("bytes_per_chunk", "group"),
    [(1, 8), (64 << 10, 8), (128 << 10, 4), (256 << 10, 2), ((512 << 10) - 1, 2), (512 << 10, 1), (8 << 20, 1)],
)
def test_small_chunks_are_grouped_by_bytes(bytes_per_chunk: int, group: int) -> None:
    assert group_chunks(bytes_per_chunk) == group


def test_no_group_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        group_chunks(0)
