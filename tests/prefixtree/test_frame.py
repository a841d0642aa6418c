"""Frames: what was packed comes back for its digest; everything else is a FrameError, whatever the bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stemcache.prefixtree import frame as frame_module
from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.frame import MAX_HEAD_BYTES, Draft, Frame, FrameHeader, level_ends, pack, unpack
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import Node, chain_digest
from stemcache.prefixtree.tokens import encode_tokens

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=4, dtype="float32", chunk_tokens=16)
NAMESPACE = Namespace.of(model="m", dtype="float32")
SECRET = b"a secret of the operator"
PREAMBLE_BYTES = 46


def header_of(n_chunks: int = 1, first_token: int = 7, **changes: object) -> FrameHeader:
    fields: dict[str, object] = {
        "codec": "raw",
        "layout": LAYOUT,
        "namespace": NAMESPACE,
        "parent": NAMESPACE.digest,
        "tokens": encode_tokens(range(first_token, first_token + 16 * n_chunks)),
    }
    return FrameHeader(**{**fields, **changes})  # type: ignore[arg-type]


HEADER = header_of(3)
LEVELS = [[b"one", b"", b"three"], [b"refined one", b"refined two", b"refined three"]]
FRAME = pack(HEADER, LEVELS)
SEALED = pack(HEADER, LEVELS, secret=SECRET)


def reason_of(data: bytes, digest: bytes = HEADER.digest, **expected: object) -> str:
    """Why `data` is refused. Nothing but a FrameError may come out, and never with the data in its text."""
    with pytest.raises(FrameError) as caught:
        unpack(data, digest, **expected)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value.reason


def contents(frame: Frame) -> list[list[bytes]]:
    return [[bytes(section) for section in level] for level in frame.levels]


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("secret", [None, SECRET])
def test_what_was_packed_comes_back(wrap: Callable[[bytes], bytes], secret: bytes | None) -> None:
    data = wrap(pack(HEADER, LEVELS, secret=secret))
    frame = unpack(data, HEADER.digest, codec="raw", layout=LAYOUT, namespace=NAMESPACE, secret=secret)
    assert frame.header == HEADER
    assert contents(frame) == LEVELS


def test_the_digest_is_the_trees() -> None:
    """A group's key is the name that the tree has for its last chunk."""
    node = Node(None, NAMESPACE.digest, -1)
    for i in range(3):
        node = Node(node, HEADER.tokens[64 * i : 64 * i + 64], i)
    assert HEADER.digest == node.digest
    assert HEADER.is_first
    later = header_of(1, parent=node.digest)
    assert later.digest == chain_digest(node.digest, later.tokens)
    assert not later.is_first


def test_sections_are_views() -> None:
    frame = unpack(FRAME, HEADER.digest)
    assert frame.levels[0][0].obj is FRAME


@settings(max_examples=50)
@given(
    sections=st.lists(st.tuples(st.binary(max_size=99), st.binary(max_size=99)).map(list), min_size=1, max_size=8),
    tokens=st.binary(min_size=128, max_size=128),
    parent=st.binary(min_size=32, max_size=32),
    secret=st.none() | st.binary(min_size=1, max_size=200),
    codec=st.text(max_size=20),
)
def test_round_trip(
    sections: list[list[bytes]], tokens: bytes, parent: bytes, secret: bytes | None, codec: str
) -> None:
    header = header_of(2, tokens=tokens, parent=parent, codec=codec)
    frame = unpack(pack(header, sections, secret=secret), header.digest, secret=secret)
    assert frame.header == header
    assert contents(frame) == sections


@pytest.mark.parametrize("data", [FRAME, SEALED], ids=["checksum", "mac"])
def test_every_truncation_is_refused(data: bytes) -> None:
    secret = SECRET if data is SEALED else None
    assert {reason_of(data[:size], secret=secret) for size in range(len(data))} == {"truncated"}


@pytest.mark.parametrize("data", [FRAME, SEALED], ids=["checksum", "mac"])
def test_every_flipped_bit_is_refused(data: bytes) -> None:
    secret = SECRET if data is SEALED else None
    reasons = set()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        reasons.add(reason_of(bytes(flipped), secret=secret))
    assert reasons == {"magic", "version_older", "version_newer", "mac", "digest", "truncated", "header", "checksum"}


def test_appended_bytes_are_refused() -> None:
    assert reason_of(FRAME + b"\0") == "oversized"


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert reason_of(data) in {"truncated", "magic"}
    assert reason_of(FRAME[:PREAMBLE_BYTES] + data) in {"truncated", "checksum"}
    assert reason_of(FRAME[: len(FRAME) - 39] + data) in {"truncated", "checksum", "oversized"}


def test_another_chunks_frame_is_refused() -> None:
    other = header_of(3, first_token=8)
    swapped = pack(other, LEVELS)
    assert reason_of(swapped) == "digest"
    assert reason_of(FRAME[:PREAMBLE_BYTES] + swapped[PREAMBLE_BYTES:]) == "checksum"


def seals_of(data: bytes) -> bytes:
    size = int.from_bytes(data[10:14], "big")
    seals: bytes = msgpack.unpackb(data[PREAMBLE_BYTES : PREAMBLE_BYTES + size])["seals"]
    return seals


@pytest.mark.parametrize("secret", [None, SECRET])
def test_seals_are_of_one_chunk_only(secret: bytes | None) -> None:
    """Equal bytes have another seal as another chunk's, and under another secret."""
    here, there = (pack(header_of(1, first), [[b"the same"]], secret=secret) for first in (1, 2))
    assert seals_of(here) != seals_of(there)
    assert seals_of(here) != seals_of(pack(header_of(1, 1), [[b"the same"]], secret=b"another"))


def test_sections_that_change_places_are_refused() -> None:
    data = pack(header_of(2), [[b"aaaa", b"bbbb"]])
    assert data.endswith(b"aaaabbbb")
    assert reason_of(data[:-8] + b"bbbbaaaa", header_of(2).digest) == "checksum"


def test_a_body_under_another_frames_header_is_refused() -> None:
    other = pack(HEADER, [[b"ONE", b"", b"THREE"], *LEVELS[1:]])
    assert len(other) == len(FRAME)
    body = sum(len(section) for level in LEVELS for section in level)
    assert reason_of(FRAME[:-body] + other[-body:]) == "checksum"


@pytest.mark.parametrize(("version", "reason"), [(0, "version_older"), (2, "version_newer"), (99, "version_newer")])
def test_other_versions_are_told_apart(version: int, reason: str) -> None:
    assert reason_of(FRAME[:6] + version.to_bytes(2, "big") + FRAME[8:]) == reason


def test_what_it_belongs_to_is_checked() -> None:
    assert reason_of(FRAME, namespace=Namespace.of(model="other", dtype="float32")) == "namespace"
    assert reason_of(FRAME, codec="lossless") == "codec"
    assert reason_of(FRAME, layout=replace(LAYOUT, kv_heads=2)) == "layout"
    assert reason_of(FRAME, layout=replace(LAYOUT, dtype="bfloat16")) == "layout"


def test_a_secret_is_needed_exactly_where_one_was_used() -> None:
    assert reason_of(SEALED) == "mac"
    assert reason_of(FRAME, secret=SECRET) == "mac"
    assert reason_of(SEALED, secret=b"another") == "checksum"
    claims_no_mac = SEALED[:8] + b"\0\0" + SEALED[10:]
    assert reason_of(claims_no_mac) == "checksum"
    with pytest.raises(ValueError, match="empty secret"):
        unpack(SEALED, HEADER.digest, secret=b"")


def test_without_the_secret_nothing_can_be_forged() -> None:
    """Who knows the format, but not the secret, can seal with checksums or with a secret of his own: neither passes."""
    forged = pack(HEADER, [[b"evil", b"", b"evil"]])
    with_flag = forged[:8] + SEALED[8:10] + forged[10:]
    assert reason_of(with_flag, secret=SECRET) == "checksum"
    assert reason_of(pack(HEADER, LEVELS, secret=b"guess"), secret=SECRET) == "checksum"


def test_fewer_levels_where_they_are_allowed() -> None:
    second = sum(map(len, LEVELS[1]))
    for cut in (1, second - 1, second):
        assert reason_of(FRAME[:-cut]) == "truncated"
        assert contents(unpack(FRAME[:-cut], HEADER.digest, allow_fewer_levels=True)) == LEVELS[:1]
    assert contents(unpack(FRAME, HEADER.digest, allow_fewer_levels=True)) == LEVELS
    assert reason_of(FRAME[: -second - 1], allow_fewer_levels=True) == "truncated"
    assert reason_of(FRAME + b"\0", allow_fewer_levels=True) == "oversized"


def test_where_the_levels_end_is_known_from_the_beginning() -> None:
    first, second = (sum(map(len, level)) for level in LEVELS)
    start = len(FRAME) - first - second
    assert level_ends(FRAME, HEADER.digest) == [start + first, len(FRAME)]
    assert level_ends(FRAME[:start], HEADER.digest) == [start + first, len(FRAME)]
    assert level_ends(SEALED[:start], HEADER.digest, secret=SECRET) == [start + first, len(SEALED)]
    assert start <= MAX_HEAD_BYTES
    for data, digest in (
        (FRAME[: start - 1], HEADER.digest),
        (b"", HEADER.digest),
        (FRAME, bytes(32)),
        (SEALED, HEADER.digest),
    ):
        with pytest.raises(FrameError):
            level_ends(data, digest)


# A header that is sealed correctly, as a hostile writer would, but says what cannot be.
def forge(change: Callable[[dict[str, object]], object], text: bytes | None = None) -> bytes:
    size = int.from_bytes(FRAME[10:14], "big")
    if text is None:
        fields = msgpack.unpackb(FRAME[PREAMBLE_BYTES : PREAMBLE_BYTES + size])
        change(fields)
        text = msgpack.packb(fields)
    head = FRAME[:10] + len(text).to_bytes(4, "big") + HEADER.digest + text
    seal = frame_module._seal(None, HEADER.digest, head)
    return head + seal + FRAME[PREAMBLE_BYTES + size + 16 :]


FORGERIES: dict[str, Callable[[dict[str, object]], object]] = {
    "no codec": lambda fields: fields.pop("codec"),
    "one field more": lambda fields: fields.update(more=1),
    "codec of another type": lambda fields: fields.update(codec=1),
    "a huge size": lambda fields: fields.update(sizes=[2**63] + [0] * 5),
    "a negative size": lambda fields: fields.update(sizes=[-1] + [0] * 5),
    "a size that is a bool": lambda fields: fields.update(sizes=[True] + [0] * 5),
    "sizes that are no list": lambda fields: fields.update(sizes=3),
    "more sections than seals": lambda fields: fields.update(sizes=[0] * 9),
    "sections that are no levels": lambda fields: fields.update(sizes=[0] * 5, seals=bytes(80)),
    "no section": lambda fields: fields.update(sizes=[], seals=b""),
    "too many levels": lambda fields: fields.update(sizes=[0] * 27, seals=bytes(27 * 16)),
    "seals that are text": lambda fields: fields.update(seals="x" * 96),
    "a short parent": lambda fields: fields.update(parent=b"short"),
    "another parent": lambda fields: fields.update(parent=bytes(32)),
    "a short namespace": lambda fields: fields.update(namespace=b""),
    "other tokens": lambda fields: fields.update(tokens=bytes(192)),
    "no tokens": lambda fields: fields.update(tokens=b""),
    "half a chunk of tokens": lambda fields: fields.update(tokens=bytes(100)),
    "layout that is no map": lambda fields: fields.update(layout=[1, 2]),
    "layout without layers": lambda fields: fields.update(layout={"kv_heads": 1}),
    "layout of unknown dtype": lambda fields: fields["layout"].update(dtype="pickle" * 1000),  # type: ignore[attr-defined]
    "layout without a token": lambda fields: fields["layout"].update(chunk_tokens=0),  # type: ignore[attr-defined]
    "layout of floats": lambda fields: fields["layout"].update(layers=2.0),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_sealed_header_that_lies_is_refused(name: str) -> None:
    assert reason_of(forge(FORGERIES[name])) == "header"


def test_the_forgeries_differ_from_the_truth_by_their_lie_only() -> None:
    assert contents(unpack(forge(lambda fields: None), HEADER.digest)) == LEVELS


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_sealed_headers_of_random_bytes_are_refused(text: bytes) -> None:
    assert reason_of(forge(lambda fields: None, text)) == "header"


@pytest.mark.parametrize(
    "text",
    [
        b"\xdf\xff\xff\xff\xff",  # a map of 4 billion entries
        b"\xdd\xff\xff\xff\xff",  # a list of as many
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x91" * 60_000,  # a list in a list in a list ...
        b"\xc7\x0c\xff" + b"\xff" * 12,  # a timestamp that is none
    ],
    ids=["map", "list", "bytes", "depth", "timestamp"],
)
def test_msgpack_bombs_take_no_memory(text: bytes) -> None:
    data = forge(lambda fields: None, text)
    tracemalloc.start()
    try:
        assert reason_of(data) == "header"
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_callers_mistakes() -> None:
    with pytest.raises(ValueError, match="1 to 64 chunks"):
        header_of(1, tokens=bytes(63))
    with pytest.raises(ValueError, match="1 to 64 chunks"):
        header_of(65)
    with pytest.raises(ValueError, match="32 bytes"):
        header_of(1, parent=b"root")
    for levels in ([], [[b"one"]], [[b"1", b"2", b"3"]] * 9):
        with pytest.raises(ValueError, match="1 to 8 levels of 3 chunks"):
            pack(HEADER, levels)
    with pytest.raises(ValueError, match="empty secret"):
        pack(HEADER, LEVELS, secret=b"")
    with pytest.raises(ValueError, match="2 sections"):
        Draft(HEADER, [1, 2])
    with pytest.raises(ValueError, match="header would have"):
        pack(header_of(3, codec="x" * 70_000), LEVELS)
