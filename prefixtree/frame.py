"""The frame: what a cold tier stores. One self-describing object for one chunk, or for several consecutive ones.

Invariant: `unpack` gives what `pack` was given for exactly this digest, or raises `FrameError` and nothing else. Stored
bytes are untrusted: every field is checked before it is used, and neither time nor memory exceeds what the input's own
size explains.

    preamble   magic, version, flags, length of the header, digest of the last chunk; big-endian
    header     msgpack: codec, layout, namespace, parent, tokens, and the size and seal of every section
    seal       16 bytes, over preamble and header
    sections   level by level and, within a level, chunk by chunk; only a progressive codec has more than one level

A seal is XXH3-128 over digest and data, so that another chunk's bytes, intact as they are, do not pass for this one's
(RocksDB calls that a context-aware checksum). With a secret it is HMAC-SHA-256, cut to 16 bytes: a checksum stops
accidents, not people. Each section has its own, so that the first levels can be trusted without reading the others.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final, TypeAlias

import numpy as np
import xxhash

from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.frame_header import MAX_LEVELS, SEAL_BYTES, Contents, FrameHeader, read_header, write_header
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.namespace import Namespace

__all__ = ["MAX_HEAD_BYTES", "VERSION", "Buffer", "Draft", "Frame", "FrameHeader", "level_ends", "pack", "unpack"]

Buffer: TypeAlias = bytes | bytearray | memoryview

VERSION: Final = 1
_MAGIC: Final = b"STEMKV"
_PREAMBLE: Final = struct.Struct(">6sHHI32s")
_SEALED_BY_SECRET: Final = 1  # the one flag
_MAX_HEADER: Final = 1 << 16
MAX_HEAD_BYTES: Final = _PREAMBLE.size + _MAX_HEADER + SEAL_BYTES


@dataclass(frozen=True, slots=True)
class Frame:
    """An unpacked frame. `levels[level][chunk]` are views into the data that was unpacked; none was copied."""

    header: FrameHeader
    levels: tuple[tuple[memoryview, ...], ...]


def pack(header: FrameHeader, levels: Sequence[Sequence[Buffer]], *, secret: bytes | None = None) -> bytes:
    """Return the frame of these sections, `levels[level][chunk]`. Copies them once.

    Raises:
        ValueError: there is not one section for each level and chunk, or there is no level, or there are more than 8;
            or the secret is empty.
    """
    if not 1 <= len(levels) <= MAX_LEVELS or any(len(level) != header.n_chunks for level in levels):
        raise ValueError(
            f"{[len(level) for level in levels]} sections do not make 1 to 8 levels of {header.n_chunks} chunks"
        )
    sections = [section for level in levels for section in level]
    sizes = [memoryview(section).nbytes for section in sections]
    return b"".join([_head(header, sizes, sections, _key(secret)), *sections])


class Draft:
    """A frame of one level whose sections are still to be written, in the memory where it will be.

    What lies elsewhere (in a pool) is so copied once; `pack` would copy it again.

    Attributes:
        sections: where to write, one for each chunk.
    """

    def __init__(self, header: FrameHeader, sizes: Sequence[int]) -> None:
        """sizes: of the sections. Raises ValueError unless there is one for each chunk."""
        if len(sizes) != header.n_chunks:
            raise ValueError(f"{len(sizes)} sections do not make a level of {header.n_chunks} chunks")
        self._header, self._sizes = header, list(sizes)
        self._start = len(_head(header, self._sizes, [b""] * len(sizes), None))  # seals do not change its length
        self._data = np.empty(self._start + sum(sizes), dtype=np.uint8).data  # a bytearray would be zeroed first
        ends = list(accumulate(sizes, initial=self._start))
        self.sections = [self._data[begin:end] for begin, end in pairwise(ends)]

    def seal(self, secret: bytes | None = None) -> memoryview:
        """Return the frame, as `pack` makes it. The sections are written, and not changed any more."""
        self._data[: self._start] = _head(self._header, self._sizes, self.sections, _key(secret))
        return self._data.toreadonly()


def unpack(
    data: Buffer,
    digest: bytes,
    *,
    codec: str | None = None,
    layout: KVLayout | None = None,
    namespace: Namespace | None = None,
    secret: bytes | None = None,
    allow_fewer_levels: bool = False,
) -> Frame:
    """Return the frame that `data` is, if it is the undamaged frame of `digest`.

    Args:
        digest: of the last chunk: the key under which `data` was found.
        codec, layout, namespace: what they must be; None lets anything pass (to look at a store of unknown contents).
        secret: if given, only what was packed with it passes; if not, only what was packed without one.
        allow_fewer_levels: let `data` end anywhere after its first level: a slow link's smaller read.

    Raises:
        FrameError: anything is not as it must be.
        ValueError: the secret is empty.
    """
    view = memoryview(data).cast("B")
    key = _key(secret)
    contents, start = _open(view, digest, key)
    _expect(contents.header, codec, layout, namespace)
    levels = _sections(view[start:], contents.sizes, contents.header.n_chunks, allow_fewer_levels)
    sections = [section for level in levels for section in level]
    for i, section in enumerate(sections):  # the seals of levels that are not there are left over
        if not hmac.compare_digest(_seal(key, digest, section), contents.seals[i]):
            raise FrameError("checksum", f"section {i} is damaged")
    return Frame(contents.header, levels)


def level_ends(data: Buffer, digest: bytes, *, secret: bytes | None = None) -> list[int]:
    """Return how many bytes of the frame hold its first level, its first two, and so on to the whole frame.

    Args:
        data: the frame, or its beginning with at least the whole header: at most `MAX_HEAD_BYTES`.
        digest, secret: as for `unpack`.

    Raises:
        FrameError: the beginning is not that of this digest's frame, or too short.
        ValueError: the secret is empty.
    """
    contents, start = _open(memoryview(data).cast("B"), digest, _key(secret))
    n_chunks = contents.header.n_chunks
    return [start + sum(contents.sizes[:end]) for end in range(n_chunks, len(contents.sizes) + 1, n_chunks)]


def _head(header: FrameHeader, sizes: Sequence[int], sections: Sequence[Buffer], key: bytes | None) -> bytes:
    """All that stands before the sections. Raises ValueError if it is too long."""
    digest = header.digest
    text = write_header(header, sizes, [_seal(key, digest, section) for section in sections])
    if len(text) > _MAX_HEADER:
        raise ValueError(f"the header would have {len(text)} bytes, at most {_MAX_HEADER} are allowed")
    flags = 0 if key is None else _SEALED_BY_SECRET
    head = _PREAMBLE.pack(_MAGIC, VERSION, flags, len(text), digest) + text
    return head + _seal(key, digest, head)


def _open(view: memoryview, digest: bytes, key: bytes | None) -> tuple[Contents, int]:
    """Check and read all that stands before the sections. Return it, and where they begin."""
    size = _head_size(view, digest, key is not None)
    head, seal = view[:size], view[size : size + SEAL_BYTES]
    if not hmac.compare_digest(_seal(key, digest, head), seal):
        raise FrameError("checksum", "the header is damaged, or sealed with another secret")
    return read_header(head[_PREAMBLE.size :], digest), size + SEAL_BYTES


def _head_size(view: memoryview, digest: bytes, is_secret: bool) -> int:
    """Check the preamble. Return the size of preamble and header, which `view` holds together with their seal."""
    if len(view) < _PREAMBLE.size:
        raise FrameError("truncated", f"{len(view)} bytes are fewer than any frame has")
    magic, version, flags, size, found = _PREAMBLE.unpack_from(view)
    if magic != _MAGIC:
        raise FrameError("magic", "this is no frame")
    if version != VERSION:
        raise FrameError(
            "version_newer" if version > VERSION else "version_older",
            f"format {version} is not {VERSION}, the one read here",
        )
    if found != digest:
        raise FrameError("digest", "this is another chunk's frame")
    if flags != (_SEALED_BY_SECRET if is_secret else 0):
        raise FrameError(
            "mac", "the frame has no MAC" if is_secret else "the frame has a MAC, and no secret is configured"
        )
    if size > _MAX_HEADER:
        raise FrameError("header", f"a header of {size} bytes is longer than any")
    if len(view) < _PREAMBLE.size + size + SEAL_BYTES:
        raise FrameError("truncated", f"{len(view)} bytes end within the header")
    return _PREAMBLE.size + int(size)


def _expect(header: FrameHeader, codec: str | None, layout: KVLayout | None, namespace: Namespace | None) -> None:
    if namespace is not None and header.namespace != namespace:
        raise FrameError("namespace", "the frame belongs to another namespace")
    if codec is not None and header.codec != codec:
        raise FrameError("codec", f"the frame is not encoded with {codec}")
    if layout is not None and header.layout != layout:
        raise FrameError("layout", f"the frame's layout is {header.layout}, not {layout}")


def _sections(
    body: memoryview, sizes: list[int], n_chunks: int, allow_fewer: bool
) -> tuple[tuple[memoryview, ...], ...]:
    """Cut the body into its levels: all of them or, if fewer are allowed, those that it holds completely."""
    levels = []
    offset = 0
    for first in range(0, len(sizes), n_chunks):
        level_sizes = sizes[first : first + n_chunks]
        if offset + sum(level_sizes) > len(body):
            break
        level = []
        for size in level_sizes:
            level.append(body[offset : offset + size])
            offset += size
        levels.append(tuple(level))
    complete = len(levels) * n_chunks == len(sizes)
    if not complete and not (allow_fewer and levels):
        raise FrameError("truncated", f"{len(body)} bytes of sections, {sum(sizes)} belong there")
    if complete and offset != len(body):
        raise FrameError("oversized", f"{len(body)} bytes of sections, {sum(sizes)} belong there")
    return tuple(levels)


def _key(secret: bytes | None) -> bytes | None:
    """A key for frames only, so that the secret may serve other purposes too."""
    if secret is None:
        return None
    if not secret:
        raise ValueError("an empty secret seals nothing; pass None for no secret")
    return hmac.digest(secret, b"stemcache.frame.v1", "sha256")


def _seal(key: bytes | None, digest: bytes, data: Buffer) -> bytes:
    """16 bytes over digest and data."""
    if key is None:
        check = xxhash.xxh3_128(digest)
        check.update(data)
        return check.digest()
    mac = hmac.new(key, digest, hashlib.sha256)
    mac.update(data)
    return mac.digest()[:SEAL_BYTES]
