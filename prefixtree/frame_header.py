"""The header of a frame: what it says of its chunks, as msgpack and back.

Invariant: a header that was read is consistent: its digest is the one asked for, and it has a size and a seal for each
section of its levels. Whatever else the bytes say is a `FrameError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgpack

from stemcache.prefixtree.errors import FrameError
from stemcache.prefixtree.layout import KVLayout
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.node import path_digests
from stemcache.prefixtree.tokens import TOKEN_BYTES

SEAL_BYTES: Final = 16
MAX_LEVELS: Final = 8
_MAX_CHUNKS: Final = 64
_MAX_SIZE: Final = 1 << 40  # of one section; only so that sums stay small integers
_FIELDS: Final = {"codec", "layout", "namespace", "parent", "tokens", "sizes", "seals"}


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
        return [self.parent, *path_digests(self.parent, self.tokens, size)][-1]

    @property
    def is_first(self) -> bool:
        """Whether the first chunk stands at position 0, so that its first tokens are the attention sinks."""
        return self.parent == self.namespace.digest


@dataclass(frozen=True, slots=True)
class Contents:
    """A header that was read, with the size and the seal of each section, in the order in which they are stored."""

    header: FrameHeader
    sizes: list[int]
    seals: list[bytes]


def write_header(header: FrameHeader, sizes: Sequence[int], seals: Sequence[bytes]) -> bytes:
    """Return the header as msgpack."""
    fields = {
        "codec": header.codec,
        "layout": asdict(header.layout),
        "namespace": header.namespace.digest,
        "parent": header.parent,
        "tokens": header.tokens,
        "sizes": sizes,
        "seals": b"".join(seals),
    }
    text: bytes = msgpack.packb(fields)
    return text


def read_header(text: memoryview, digest: bytes) -> Contents:
    """Return what `write_header` was given.

    Raises:
        FrameError: it is no header, contradicts itself, or is not that of `digest`.
    """
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
    if rest or not 1 <= n_levels <= MAX_LEVELS:
        raise FrameError("header", f"{len(sizes)} sections are no levels of {header.n_chunks} chunks")
    return Contents(header, sizes, seals)


def _read_sections(sizes: Any, seals: Any) -> tuple[list[int], list[bytes]]:
    if type(sizes) is not list or any(type(size) is not int or not 0 <= size <= _MAX_SIZE for size in sizes):
        raise FrameError("header", "sizes of sections must be integers")
    if type(seals) is not bytes or len(seals) != SEAL_BYTES * len(sizes):
        raise FrameError("header", "every section must have a seal")
    return sizes, [seals[i : i + SEAL_BYTES] for i in range(0, len(seals), SEAL_BYTES)]


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
