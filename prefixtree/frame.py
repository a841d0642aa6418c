"""The frame: what a cold tier stores. One self-describing object for one chunk, or for several consecutive ones.

Invariant: `unpack` gives what `pack` was given for exactly this digest, or raises `FrameError` and nothing else. Stored
bytes are untrusted: every field is checked before it is used, and neither time nor memory exceeds what the input's own
size explains.

    preamble   magic, version, flags, length of the header, digest of the last chunk; big-endian
    header     msgpack: codec, layout, namespace, parent, tokens, and the size and seal of every section
    seal       16 bytes, over preamble and header
    sections   level by level and, within a level, chunk by chunk; only a progressive codec has more than one level

A seal is XXH3-128 over digest, place and data, so that neither another chunk's bytes nor another section's pass for
these (RocksDB calls that a context-aware checksum). With a secret it is HMAC-SHA-256, cut to 16 bytes: a checksum stops
accidents, not people. Each section has its own, so that the first levels can be trusted without reading the others.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeAlias

import msgpack
import xxhash

from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import chain_digest
from stemcache.prefixtree.tokens import TOKEN_BYTES

Buffer: TypeAlias = bytes | bytearray | memoryview

VERSION: Final = 1
_MAGIC: Final = b"STEMKV"
_PREAMBLE: Final = struct.Struct(">6sHHI32s")
_SEALED_BY_SECRET: Final = 1  # the one flag
_SEAL_BYTES: Final = 16
_FIELDS: Final = {"codec", "layout", "namespace", "parent", "tokens", "sizes", "seals"}
_MAX_HEADER: Final = 1 << 16
_MAX_CHUNKS: Final = 64
_MAX_LEVELS: Final = 8
_MAX_SIZE: Final = 1 << 40  # of one section; only so that sums stay small integers


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame says of itself.

    Attributes:
        codec: the name of the codec that made the sections.
        layout: of each chunk.
        namespace: which tree the chunks belong to.
        parent: digest of the chunk before the first one; the namespace's digest if there is none.
        tokens: of all chunks, as `encode_tokens` gives them: one to 64 whole chunks.

    Raises:
        ValueError: the tokens are no whole chunks or too many, or parent is no digest.
    """

    codec: str
    layout: KVLayout
    namespace: Namespace
    parent: bytes
    tokens: bytes

    def __post_init__(self) -> None:
        chunk_bytes = self.layout.chunk_tokens * TOKEN_BYTES
        n_chunks, rest = divmod(len(self.tokens), chunk_bytes)
        if rest or not 1 <= n_chunks <= _MAX_CHUNKS:
            raise ValueError(
                f"a frame holds 1 to {_MAX_CHUNKS} chunks of {chunk_bytes} token bytes, not {len(self.tokens)}"
            )
        if len(self.parent) != 32:
            raise ValueError(f"a parent's digest has 32 bytes, not {len(self.parent)}")

    @property
    def n_chunks(self) -> int:
        return len(self.tokens) // (self.layout.chunk_tokens * TOKEN_BYTES)

    @property
    def digest(self) -> bytes:
        """The last chunk's, which is the object's key: `Node.digest`. SHA-256 along the chain."""
        size = self.layout.chunk_tokens * TOKEN_BYTES
        digest = self.parent
        for start in range(0, len(self.tokens), size):
            digest = chain_digest(digest, self.tokens[start : start + size])
        return digest

    @property
    def is_first(self) -> bool:
        """Whether the first chunk stands at position 0, so that its first tokens are the attention sinks."""
        return self.parent == self.namespace.digest


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
    if not 1 <= len(levels) <= _MAX_LEVELS or any(len(level) != header.n_chunks for level in levels):
        raise ValueError(
            f"{[len(level) for level in levels]} sections do not make 1 to 8 levels of {header.n_chunks} chunks"
        )
    digest, key = header.digest, _key(secret)
    sections = [section for level in levels for section in level]
    fields = {
        "codec": header.codec,
        "layout": asdict(header.layout),
        "namespace": header.namespace.digest,
        "parent": header.parent,
        "tokens": header.tokens,
        "sizes": [memoryview(section).nbytes for section in sections],
        "seals": b"".join(_seal(key, digest, place, section) for place, section in enumerate(sections, 1)),
    }
    text: bytes = msgpack.packb(fields)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"the header would have {len(text)} bytes, at most {_MAX_HEADER} are allowed")
    flags = 0 if secret is None else _SEALED_BY_SECRET
    head = _PREAMBLE.pack(_MAGIC, VERSION, flags, len(text), digest) + text
    return b"".join([head, _seal(key, digest, 0, head), *sections])


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
    head_size = _head_size(view, digest, secret)
    key = _key(secret)
    head, seal = view[:head_size], view[head_size : head_size + _SEAL_BYTES]
    if not hmac.compare_digest(_seal(key, digest, 0, head), seal):
        raise FrameError("checksum", "the header is damaged, or sealed with another secret")
    header, sizes, seals = _read_header(head[_PREAMBLE.size :], digest)
    _expect(header, codec, layout, namespace)
    levels = _sections(view[head_size + _SEAL_BYTES :], sizes, header.n_chunks, allow_fewer_levels)
    place = 0
    for level in levels:
        for section in level:
            if not hmac.compare_digest(_seal(key, digest, place + 1, section), seals[place]):
                raise FrameError("checksum", f"section {place} is damaged")
            place += 1
    return Frame(header, levels)


def _head_size(view: memoryview, digest: bytes, secret: bytes | None) -> int:
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
    if flags != (0 if secret is None else _SEALED_BY_SECRET):
        raise FrameError(
            "mac", "the frame has no MAC" if secret is not None else "the frame has a MAC, and no secret is configured"
        )
    if size > _MAX_HEADER:
        raise FrameError("header", f"a header of {size} bytes is longer than any")
    if len(view) < _PREAMBLE.size + size + _SEAL_BYTES:
        raise FrameError("truncated", f"{len(view)} bytes end within the header")
    return _PREAMBLE.size + int(size)


def _read_header(text: memoryview, digest: bytes) -> tuple[FrameHeader, list[int], list[bytes]]:
    """Return the header and, by section, sizes and seals."""
    try:
        fields = msgpack.unpackb(text, max_ext_len=0)
    except (ValueError, OverflowError, msgpack.UnpackException):
        raise FrameError("header", "the header is not msgpack") from None
    if type(fields) is not dict or fields.keys() != _FIELDS:
        raise FrameError("header", "the header has other fields than a frame's")
    sizes, seals = _read_sections(fields["sizes"], fields["seals"])
    try:
        header = FrameHeader(
            codec=_typed(str, fields["codec"]),
            layout=_read_layout(fields["layout"]),
            namespace=Namespace(_typed(bytes, fields["namespace"])),
            parent=_typed(bytes, fields["parent"]),
            tokens=_typed(bytes, fields["tokens"]),
        )
    except ValueError:  # its text may hold stored bytes
        raise FrameError("header", "a field of the header is not what it must be") from None
    if header.digest != digest:
        raise FrameError("header", "tokens and parent do not give the digest")
    n_levels, rest = divmod(len(sizes), header.n_chunks)
    if rest or not 1 <= n_levels <= _MAX_LEVELS:
        raise FrameError("header", f"{len(sizes)} sections are no levels of {header.n_chunks} chunks")
    return header, sizes, seals


def _read_sections(sizes: Any, seals: Any) -> tuple[list[int], list[bytes]]:
    if type(sizes) is not list or any(type(size) is not int or not 0 <= size <= _MAX_SIZE for size in sizes):
        raise FrameError("header", "sizes of sections must be integers")
    if type(seals) is not bytes or len(seals) != _SEAL_BYTES * len(sizes):
        raise FrameError("header", "every section must have a seal")
    return sizes, [seals[i : i + _SEAL_BYTES] for i in range(0, len(seals), _SEAL_BYTES)]


def _read_layout(fields: Any) -> KVLayout:
    """Raises ValueError, as KVLayout does for sizes that cannot be."""
    if type(fields) is not dict or fields.keys() != {"layers", "kv_heads", "head_dim", "dtype", "chunk_tokens"}:
        raise ValueError("the layout has other fields than a layout's")
    dtype = _typed(str, fields.pop("dtype"))
    return KVLayout(dtype=dtype, **{name: _typed(int, value) for name, value in fields.items()})


def _typed(kind: type[Any], value: Any) -> Any:
    """Return value if it is exactly of this type (True is not an int here)."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} stands where a {kind.__name__} belongs")
    return value


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


def _seal(key: bytes | None, digest: bytes, place: int, data: Buffer) -> bytes:
    """16 bytes over digest, place (0 for the header, then the sections) and data."""
    context = digest + place.to_bytes(4, "big")
    if key is None:
        check = xxhash.xxh3_128(context)
        check.update(data)
        return check.digest()
    mac = hmac.new(key, context, hashlib.sha256)
    mac.update(data)
    return mac.digest()[:_SEAL_BYTES]
