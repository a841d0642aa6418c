"""The namespace: everything besides the tokens that decides what a chunk's keys and values are.

Invariant: two namespaces are equal only if every field is. The digest is SHA-256 over fields that carry their tag, type
and length. Plain concatenation would not do: ("ab", "c") and ("a", "bc") would be one key, and without the tag a LoRA
adapter called "X" and a cache salt "X" share keys, which leaked one tenant's cache to another in vLLM (issue 44701)
and in OpenVINO GenAI (issue 3722).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

Field = str | bytes | int

# A version of this encoding, hashed first: changing the encoding must change every digest.
_SCHEMA = b"stemcache.namespace.v1"


@dataclass(frozen=True, slots=True)
class Namespace:
    """The root of one prefix tree, in every tier. Compare and hash it by its 32-byte `digest`."""

    digest: bytes

    @classmethod
    def of(cls, *, model: Field, dtype: Field, tenant: Field = b"", **more: Field) -> Namespace:
        """Return the namespace of these fields. An absent field differs from an empty one.

        Args:
            model: fingerprint of weights and config, rotary parameters included; not a name, which revisions share.
            dtype: of the stored keys and values.
            tenant: a salt derived on the server. Tenants with different salts never share a chunk.
            more: whatever else changes the stored numbers: chunk layout, rope overrides, codec, adapter, policy.

        Raises:
            TypeError: a field is not str, bytes or int.
        """
        fields = {"model": model, "dtype": dtype, "tenant": tenant, **more}
        hasher = hashlib.sha256(_SCHEMA)
        for tag in sorted(fields):
            kind, value = _encode(tag, fields[tag])
            for part in (tag.encode(), kind, value):
                hasher.update(len(part).to_bytes(8, "big"))
                hasher.update(part)
        return cls(hasher.digest())

    def __post_init__(self) -> None:
        if len(self.digest) != 32:
            raise ValueError(f"a namespace digest has 32 bytes, not {len(self.digest)}")


def _encode(tag: str, value: Field) -> tuple[bytes, bytes]:
    """Return (type, bytes) of a field, so that 1, "1" and b"1" are three different values."""
    if isinstance(value, str):
        return b"str", value.encode()
    if isinstance(value, bytes):
        return b"bytes", value
    if isinstance(value, int):
        return b"int", str(int(value)).encode()
    raise TypeError(f"namespace field {tag!r} must be str, bytes or int, not {type(value).__name__}")
