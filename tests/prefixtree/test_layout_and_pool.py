"""The layout's arithmetic and the pool's memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch

from stemcache.prefixtree.errors import CapacityError
from stemcache.prefixtree.layout import DTYPE_BYTES, KVLayout
from stemcache.prefixtree.pool import KVPool

LAYOUT = KVLayout(layers=3, kv_heads=2, head_dim=5, dtype="float32", chunk_tokens=16)


def test_sizes() -> None:
    """Llama-3.1-8B in bfloat16 keeps 131,072 bytes per token."""
    llama = KVLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16", chunk_tokens=64)
    assert llama.bytes_per_token == 131_072
    assert llama.bytes_per_chunk == 64 * 131_072
    assert llama.chunks_in(10 * llama.bytes_per_chunk - 1) == 9


def test_a_pool_smaller_than_a_chunk_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match=f"holds no chunk of {LAYOUT.bytes_per_chunk} bytes"):
        LAYOUT.chunks_in(LAYOUT.bytes_per_chunk - 1)
    with pytest.raises(CapacityError, match="at least one chunk"):
        KVPool(LAYOUT, 0)


@pytest.mark.parametrize("chunk_tokens", [0, 8, 24, 48, 512, -16])
def test_chunk_tokens_is_a_power_of_two_from_16_to_256(chunk_tokens: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        replace(LAYOUT, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim"])
def test_sizes_are_positive(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least 1"):
        KVLayout(**{**asdict(LAYOUT), field: 0})


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        replace(LAYOUT, dtype="int8")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_the_pool_is_zeroed_and_of_the_layouts_size(dtype: str) -> None:
    pool = KVPool(replace(LAYOUT, dtype=dtype), 7)
    assert pool.tensor.shape == (3, 2, 2, 7, 16, 5)
    assert pool.tensor.dtype == getattr(torch, dtype)
    assert pool.tensor.numel() * pool.tensor.itemsize == 7 * pool.layout.bytes_per_chunk
    assert not pool.tensor.any()


def test_a_layer_is_a_view_in_which_consecutive_slots_are_contiguous() -> None:
    pool = KVPool(LAYOUT, 4)
    layer = pool.layer(1)
    layer[0, 1, 2, 15, 4] = 7.0
    assert pool.tensor[1, 0, 1, 2, 15, 4] == 7.0
    assert layer[0].view(2, 4 * 16, 5)[1, 2 * 16 + 15, 4] == 7.0


@pytest.mark.parametrize("n_tokens", [0, 1, 15, 16])
def test_copy_tokens_copies_all_layers_keys_and_values_and_nothing_else(n_tokens: int) -> None:
    pool = KVPool(LAYOUT, 4)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(0)))
    expected = pool.tensor.clone()
    for layer in range(3):
        for stream in range(2):
            for token in range(n_tokens):
                expected[layer, stream, :, 3, token] = expected[layer, stream, :, 1, token]
    pool.copy_tokens(1, 3, n_tokens)
    assert torch.equal(pool.tensor, expected)


def test_memory_that_cannot_be_had_is_a_capacity_error() -> None:
    with pytest.raises(CapacityError, match="does not fit on cpu, take a smaller one"):
        KVPool(LAYOUT, 2**50)


def random_pool(n_chunks: int = 4) -> KVPool:
    pool = KVPool(LAYOUT, n_chunks)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(0)))
    return pool


def test_a_chunk_that_is_read_is_a_contiguous_copy() -> None:
    pool = random_pool()
    chunk = pool.read_chunk(2)
    assert chunk.shape == LAYOUT.chunk_shape == (3, 2, 2, 16, 5)
    assert chunk.is_contiguous()
    assert torch.equal(chunk, pool.tensor[:, :, :, 2])
    pool.tensor.zero_()
    assert chunk.any()


def test_a_chunk_that_is_written_changes_its_slot_and_nothing_else() -> None:
    pool, other = random_pool(), random_pool()
    chunk = torch.full(LAYOUT.chunk_shape, float("nan"))
    pool.write_chunk(1, chunk)
    assert pool.read_chunk(1).isnan().all()
    for slot in (0, 2, 3):
        assert torch.equal(pool.read_chunk(slot), other.read_chunk(slot))


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies on side streams need a GPU")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_bytes_go_straight_out_and_in(dtype: str, device: str) -> None:
    """As the tensor's way does it, from and into memory of others."""
    layout = KVLayout(layers=3, kv_heads=2, head_dim=5, dtype=dtype, chunk_tokens=16)
    pool, size = KVPool(layout, 4, device), layout.bytes_per_chunk
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(0)))
    before, chunk = pool.tensor.clone(), bytearray(size)
    pool.copy_out(2, memoryview(chunk))
    assert bytes(chunk) == pool.read_chunk(2).view(torch.uint8).numpy().tobytes()
    pool.copy_in(1, memoryview(bytes(chunk)))
    before[:, :, :, 1] = before[:, :, :, 2]
    assert torch.equal(pool.tensor, before)
    for wrong in (bytes(size - 1), bytes(size + 1)):
        with pytest.raises(ValueError, match=f"has {size} bytes, not {len(wrong)}"):
            pool.copy_in(1, wrong)
        with pytest.raises(ValueError, match=f"has {size} bytes"):
            pool.copy_out(1, memoryview(bytearray(wrong)))
    for slot in (-1, 4):
        with pytest.raises(IndexError, match="no slot"):
            pool.copy_in(slot, chunk)
        with pytest.raises(IndexError, match="no slot"):
            pool.copy_out(slot, memoryview(chunk))
    assert torch.equal(pool.tensor, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_slot_may_be_given_up_once_its_copy_out_has_been_started(device: str) -> None:
    """Many copies under way while their slots are overwritten, by computation and by what comes in on other threads."""
    layout = KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16", chunk_tokens=64)
    pool, size = KVPool(layout, 8, device), layout.bytes_per_chunk
    with ThreadPoolExecutor(2) as others:
        for turn in range(8):
            pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(turn)))
            expected = [pool.read_chunk(slot).view(torch.uint8).numpy().tobytes() for slot in range(8)]
            chunks = [bytearray(size) for _ in range(8)]
            copies = [pool.start_copy_out(slot, memoryview(chunk)) for slot, chunk in enumerate(chunks)]
            arrivals = [others.submit(pool.copy_in, slot, bytes([turn]) * size) for slot in range(0, 8, 2)]
            pool.wipe(range(1, 8, 2))
            list(others.map(lambda finish: finish(), copies))
            assert [bytes(chunk) for chunk in chunks] == expected
            for arrival in arrivals:
                arrival.result()
            for slot in range(8):
                content = bytes([turn if slot % 2 == 0 else 0]) * size
                assert pool.read_chunk(slot).view(torch.uint8).numpy().tobytes() == content


@pytest.mark.parametrize("slot", [-1, 4])
def test_slots_that_are_not_there_are_neither_read_nor_written(slot: int) -> None:
    pool = random_pool()
    with pytest.raises(IndexError, match=f"no slot {slot} in a pool of 4"):
        pool.read_chunk(slot)
    with pytest.raises(IndexError, match="no slot"):
        pool.write_chunk(slot, pool.read_chunk(0))


def test_chunks_of_another_shape_or_dtype_are_not_written() -> None:
    """`copy_` alone would broadcast the one and convert the other."""
    pool = random_pool()
    before = pool.tensor.clone()
    for chunk in (pool.read_chunk(0)[:1], pool.read_chunk(0).double(), torch.zeros(())):
        with pytest.raises(ValueError, match="a chunk of this pool is float32"):
            pool.write_chunk(0, chunk)
    assert torch.equal(pool.tensor, before)
