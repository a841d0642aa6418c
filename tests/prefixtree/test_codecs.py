"""Codecs: exact ones give the very bits back, lossy ones stay within their bounds, and no bytes do harm."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stemcache.prefixtree.chunk_frames import ChunkDraft, group_chunks, pack_chunks, unpack_bytes, unpack_chunks
from stemcache.prefixtree.codecs.codec import byte_view, torch_dtype
from stemcache.prefixtree.codecs.entropy import EntropyCoder
from stemcache.prefixtree.codecs.packing import pack_codes, pack_thirds, unpack_codes, unpack_thirds
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


@settings(max_examples=30)
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
@settings(max_examples=50)
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


# --- lossy codecs -----------------------------------------------------------------------------------------------------

LOSSY = [name for name in CODEC_NAMES if not get_codec(name).is_exact]
UP = 1 + 2**-7  # how much rounding up to bfloat16 can add to a scale


def groups_of_32(values: Tensor) -> Tensor:
    """The last axis in groups of 32, filled up with the last value."""
    fill = values[..., -1:].expand(*values.shape[:-1], -values.shape[-1] % 32)
    return torch.cat([values, fill], -1).unflatten(-1, (-1, 32))


def kivi_bound(values: Tensor, bits: int) -> Tensor:
    def half_steps(groups: Tensor, axis: int) -> Tensor:
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
        return ((high - low + low.abs() * (UP - 1)) * UP / (2**bits - 1) / 2).expand(groups.shape)

    tokens = min(32, values.shape[3])
    keys = half_steps(values[:, 0].unflatten(2, (-1, tokens)), 3).flatten(2, 3)
    by_token = half_steps(groups_of_32(values[:, 1]), 4).flatten(3, 4)[..., : values.shape[-1]]
    return torch.stack([keys, by_token], 1)


def q4_bound(values: Tensor) -> Tensor:
    """The transform keeps lengths: no transformed magnitude is above the group's length, no error above their sum."""
    filled = torch.nn.functional.pad(values, (0, -values.shape[-1] % 32)).unflatten(-1, (-1, 32))
    length = filled.norm(dim=-1, keepdim=True) * 32**0.5 / 16 * UP
    return length.expand(filled.shape).flatten(-2)[..., : values.shape[-1]]


def hadamard_32() -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / 32**0.5


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_q4_is_half_a_step_off_in_each_transformed_value(layout: KVLayout) -> None:
    codec, chunk = get_codec("q4"), random_chunk(replace(layout, dtype="float32"))
    decoded = codec.decode(codec.encode(chunk), replace(layout, dtype="float32"))
    fill = (0, -layout.head_dim % 32)
    exact = torch.nn.functional.pad(chunk.double(), fill).unflatten(-1, (-1, 32)) @ hadamard_32()
    found = torch.nn.functional.pad(decoded.double(), fill).unflatten(-1, (-1, 32)) @ hadamard_32()
    half_step = exact.abs().amax(-1, keepdim=True) / 16 * UP + 1e-5
    if layout.head_dim % 32 == 0:  # else what fell on the filling is cut off, and with it the transform's exactness
        assert bool(((found - exact).abs() <= half_step).all())
    assert bool(((found - exact).norm(dim=-1, keepdim=True) <= half_step * 32**0.5).all())


@pytest.mark.parametrize("count", [1, 4, 5, 6, 640])
def test_thirds_are_packed_five_to_a_byte(count: int) -> None:
    codes = torch.randint(0, 3, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_thirds(codes)
    assert len(packed) == -(-count // 5)
    assert packed.max() <= 242
    assert torch.equal(unpack_thirds(packed, count), codes)


@pytest.mark.parametrize("bits_per_code", [2, 4])
def test_codes_are_packed_without_a_gap(bits_per_code: int) -> None:
    codes = torch.randint(0, 2**bits_per_code, (640,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits_per_code)
    assert 8 * len(packed) == 640 * bits_per_code
    assert torch.equal(unpack_codes(packed, bits_per_code), codes)


def test_words_that_no_symbol_needs_are_refused() -> None:
    coder = EntropyCoder(2, 3)
    classes = [np.array([0, 1, 2, 1], dtype=np.int32), np.empty(0, dtype=np.int32)]
    data = coder.encode(classes)
    assert [part.tolist() for part in coder.decode(memoryview(data), [4, 0])] == [[0, 1, 2, 1], []]
    longer = data[:12] + (2).to_bytes(4, "little") + data[16:] + b"\1\0\0\0"
    assert len(data) == 20
    with pytest.raises(FrameError, match="more words than symbols"):
        coder.decode(memoryview(longer), [4, 0])
    with pytest.raises(FrameError, match="no histogram"):
        coder.decode(memoryview(data), [4, 1])
    with pytest.raises(FrameError, match="end with a zero"):
        coder.decode(memoryview(data[:16] + bytes(4)), [4, 0])


def test_a_frequent_symbol_does_not_hide_a_rare_one() -> None:
    """Counts are cut to 16 bits."""
    symbols = np.zeros(1_000_000, dtype=np.int32)
    symbols[77] = 2
    data = EntropyCoder(1, 3).encode([symbols])
    assert len(data) < 50
    assert np.array_equal(EntropyCoder(1, 3).decode(memoryview(data), [len(symbols)])[0], symbols)


def cachegen_bound(values: Tensor, levels: int = 3) -> Tensor:
    """A token's scale is not above its largest magnitude and its channel's mean together; 5 bins are the fewest."""
    means = values[:, :1].mean(3, keepdim=True).abs().amax((2, 4), keepdim=True).expand(-1, 2, -1, -1, -1)
    return ((values.abs().amax((2, 4), keepdim=True) + means * UP) * UP / (5 * 3 ** (levels - 1))).expand(values.shape)


def error_bound(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codec's page promises, for float64 values of a chunk of `dtype`, in which the result is rounded."""
    absmax = values.abs().amax(-1, keepdim=True)
    bound = {
        "int8": lambda: (absmax * UP / 254).expand(values.shape),
        "fp8_e4m3": lambda: torch.maximum(values.abs() * 2**-4, absmax * UP / 448 * 2**-10),
        "fp8_e5m2": lambda: torch.maximum(values.abs() * 2**-3, absmax * UP / 57344 * 2**-17),
        "q4": lambda: q4_bound(values),
        "kivi4": lambda: kivi_bound(values, 4),
        "kivi2": lambda: kivi_bound(values, 2),
        "cachegen": lambda: cachegen_bound(values),
    }[name]()
    rounding = torch.finfo(dtype).eps * (values.abs() + bound) + 1e-6 * absmax.amax((2, 4), keepdim=True)
    return bound + rounding + torch.finfo(dtype).tiny


def assert_within_bound(name: str, chunk: Tensor, decoded: Tensor, what: str = "") -> None:
    assert decoded.dtype == chunk.dtype
    assert decoded.shape == chunk.shape
    assert decoded.is_contiguous()
    values = chunk.double()
    error = (decoded.double() - values).abs()
    assert bool((error <= error_bound(name, values, chunk.dtype)).all()), f"{what}: {error.max()}"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", LOSSY)
def test_lossy_codecs_stay_within_their_bound(name: str, layout: KVLayout) -> None:
    """And what holds a number that is none, or one too large to have a scale, comes back as it was."""
    codec = get_codec(name)
    chunk = random_chunk(layout)
    decoded = codec.decode(codec.encode(chunk), layout)
    assert_within_bound(name, chunk, decoded)
    assert not torch.equal(decoded, chunk), "a codec without loss would pass any bound"
    for what, hard in adversarial_chunks(layout).items():
        decoded = codec.decode(codec.encode(hard), layout)
        if bool(hard.isfinite().all()):
            assert_within_bound(name, hard, decoded, what)
        else:
            assert torch.equal(bits(decoded), bits(hard)), what


@settings(max_examples=60)
@given(
    name=st.sampled_from(LOSSY),
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 70),
    chunk_tokens=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from(list(DTYPE_BYTES)),
    magnitude=st.floats(-38, 38),
    seed=st.integers(0, 99),
)
def test_lossy_codecs_on_any_layout_and_magnitude(
    name: str, layers: int, kv_heads: int, head_dim: int, chunk_tokens: int, dtype: str, magnitude: float, seed: int
) -> None:
    layout = KVLayout(layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, chunk_tokens=chunk_tokens)
    limit = torch.finfo(torch_dtype(layout)).max
    numbers = random_chunk(replace(layout, dtype="float32"), seed).double() * 10**magnitude
    chunk = numbers.clamp(-limit, limit).to(torch_dtype(layout))
    codec = get_codec(name)
    assert_within_bound(name, chunk, codec.decode(codec.encode(chunk), layout))


@pytest.mark.parametrize("name", LOSSY)
def test_sinks_keep_their_bits(name: str) -> None:
    """Also where they would have widened everybody's range; and the other tokens are none the worse."""
    layout, codec = LAYOUTS["odd"], get_codec(name)
    chunk = random_chunk(layout)
    chunk[:, :, :, :4] *= 1000
    decoded = codec.decode(codec.encode(chunk, sinks=4), layout, sinks=4)
    assert torch.equal(bits(decoded[:, :, :, :4]), bits(chunk[:, :, :, :4]))
    without = chunk.clone()
    without[:, :, :, :4] = chunk[:, :, :, 4:5]
    expected = codec.decode(codec.encode(without), layout)
    assert torch.equal(decoded[:, :, :, 4:], expected[:, :, :, 4:])


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_encoding_does_not_change_the_chunk(name: str) -> None:
    chunk = random_chunk(LAYOUTS["small"])
    before = chunk.clone()
    get_codec(name).encode(chunk, sinks=4)
    assert torch.equal(chunk, before)


@pytest.mark.parametrize("name", LOSSY)
def test_bits_per_value_is_what_is_stored(name: str) -> None:
    layout = KVLayout(layers=6, kv_heads=3, head_dim=64, dtype="bfloat16")
    codec, chunk = get_codec(name), random_chunk(KVLayout(layers=6, kv_heads=3, head_dim=64, dtype="bfloat16"))
    stored = 8 * sum(len(level) for level in codec.encode(chunk)) / chunk.numel()
    assert stored == pytest.approx(codec.bits_per_value(layout), rel=0.15 if name == "cachegen" else 0.001)


def test_the_bits_of_the_real_shape() -> None:
    """SmolLM2-135M's heads of 64, as in the table of docs/codecs.md."""
    layout = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
    names = ("raw", "int8", "fp8_e4m3", "fp8_e5m2", "q4", "kivi4", "kivi2")
    assert [get_codec(name).bits_per_value(layout) for name in names] == [16, 8.25, 8.25, 8.25, 4.5, 5, 3]


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_threads_may_share_a_codec(name: str) -> None:
    layout, codec = LAYOUTS["small"], get_codec(name)
    chunks = [random_chunk(layout, seed) for seed in range(16)]
    alone = [codec.decode(codec.encode(chunk), layout) for chunk in chunks]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda chunk: codec.decode(codec.encode(chunk), layout), chunks))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_each_level_of_cachegen_refines_the_one_before() -> None:
    layout, codec = LAYOUTS["half"], get_codec("cachegen")
    chunk = random_chunk(layout)
    levels = codec.encode(chunk, sinks=4)
    values = chunk.double()
    errors = []
    for n_levels in (1, 2, 3):
        decoded = codec.decode(levels[:n_levels], layout, sinks=4)
        error = (decoded.double() - values).abs()
        assert bool((error <= cachegen_bound(values, n_levels) + 1e-3 * values.abs()).all())
        errors.append(float(error.norm()))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.5 * errors[1]


def test_a_slow_link_may_take_cachegens_first_levels() -> None:
    layout, codec = LAYOUTS["half"], get_codec("cachegen")
    chunks = [random_chunk(layout, seed) for seed in range(2)]
    header = header_of(layout, 2, "cachegen")
    data = pack_chunks(header, chunks, codec)
    encoded = [codec.encode(chunk, sinks=4 * (i == 0)) for i, chunk in enumerate(chunks)]
    finest = sum(len(levels[2]) for levels in encoded)
    where = {"layout": layout, "namespace": NAMESPACE}
    found = unpack_chunks(data[:-finest], header.digest, codec, allow_fewer_levels=True, **where)  # type: ignore[arg-type]
    for i, (chunk, levels) in enumerate(zip(found, encoded, strict=True)):
        assert torch.equal(chunk, codec.decode(levels[:2], layout, sinks=4 * (i == 0)))
    with pytest.raises(FrameError, match="sections"):
        unpack_chunks(data[:-finest], header.digest, codec, **where)  # type: ignore[arg-type]


def test_cachegen_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match=r"pip install 'stemcache\[codecs\]'"):
        get_codec("cachegen")


# --- exact codecs, frames ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.72), ("float16", 0.9), ("float32", 0.9)])
def test_lossless_saves_what_it_says(dtype: str, most: float) -> None:
    layout = KVLayout(layers=4, kv_heads=3, head_dim=64, dtype=dtype)
    codec = get_codec("lossless")
    (level,) = codec.encode(random_chunk(layout))
    share = len(level) / layout.bytes_per_chunk
    assert share < most
    assert codec.bits_per_value(layout) == pytest.approx(8 * DTYPE_BYTES[dtype] * share, rel=0.1)


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
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_groups_of_chunks_through_a_frame(name: str, layout: KVLayout) -> None:
    """The sinks are those of the first chunk, and only where the group begins at position 0."""
    chunks = [random_chunk(layout, seed) for seed in range(3)]
    codec = get_codec(name)
    for parent, sinks in ((NAMESPACE.digest, 4), (bytes(32), 0)):
        header = header_of(layout, 3, name, parent)
        data = pack_chunks(header, chunks, codec, secret=b"s")
        found = unpack_chunks(data, header.digest, codec, layout=layout, namespace=NAMESPACE, secret=b"s")
        for i, (chunk, got) in enumerate(zip(chunks, found, strict=True)):
            kept = sinks if i == 0 else 0
            assert torch.equal(got, codec.decode(codec.encode(chunk, sinks=kept), layout, sinks=kept))
            exact = codec.is_exact or kept
            assert torch.equal(bits(got[:, :, :, :4]), bits(chunk[:, :, :, :4])) == bool(exact)
        draft = ChunkDraft(header, codec)
        for part, chunk in zip(draft.parts, chunks, strict=True):
            part[:] = byte_view(chunk).data
        assert draft.n_bytes == sum(chunk.nbytes for chunk in chunks)
        assert draft.pack(b"s") == data
        in_bytes = unpack_bytes(data, header.digest, codec, layout=layout, namespace=NAMESPACE, secret=b"s")
        assert [bytes(each) for each in in_bytes] == [byte_view(got).tobytes() for got in found]
        assert all(each.obj is data for each in in_bytes) == codec.is_identity


def test_a_frame_of_another_codec_or_of_a_wrong_payload_is_refused() -> None:
    layout = LAYOUTS["small"]
    header = header_of(layout, 1, "raw")
    expected = {"layout": layout, "namespace": NAMESPACE}
    data = pack_chunks(header, [random_chunk(layout)], get_codec("raw"))
    with pytest.raises(FrameError, match="not encoded with lossless"):
        unpack_chunks(data, header.digest, get_codec("lossless"), **expected)  # type: ignore[arg-type]
    with pytest.raises(FrameError, match="1280 belong"):
        unpack_chunks(pack(header, [[b"short"]]), header.digest, get_codec("raw"), **expected)  # type: ignore[arg-type]
    for levels in ([[b"short"]], [[bytes(1280)], [bytes(1280)]]):
        with pytest.raises(FrameError) as caught:
            unpack_bytes(pack(header, levels), header.digest, get_codec("raw"), **expected)  # type: ignore[arg-type]
        assert caught.value.reason == "payload"


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
