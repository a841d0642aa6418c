"""Large values through redis-py without its copies: received where they stay, and sent from where they are.

Invariant: what is no large string, and is not at the beginning of what the connection has to read, goes through hiredis
as ever.

hiredis reads into a buffer, feeds that to its reader, and makes bytes of it: three copies of each megabyte. Packing a
command is one more. A bytearray to receive into would be zeroed first, an eighth of the time that a load takes here.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from redis.connection import DefaultParser, PythonRespSerializer
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.utils import HIREDIS_AVAILABLE

READ_BYTES: Final = 1 << 16
_LARGE: Final = 1 << 17
_PACKED_BYTES: Final = 6000  # redis-py's own limit under which copying is cheaper than another call


_Parser: Any = DefaultParser


class _BlobParser(_Parser):  # type: ignore[misc]
    """hiredis' parser, which takes large strings off the socket by itself. They come as memoryviews."""

    def read_response(self, disable_decoding: bool = False, *arguments: Any, **options: Any) -> Any:
        if self._reader is not None and not self._reader.has_data():
            blob = self._blob()
            if blob is not None:
                return blob
        return super().read_response(disable_decoding, *arguments, **options)

    def _blob(self) -> memoryview | None:
        """The reply, if it is a large string; else None, and what was read of it is hiredis' to go on with."""
        try:
            n_read = self._sock.recv_into(self._buffer)
            start = self._buffer.find(b"\r\n", 0, min(n_read, 32)) + 2
            digits = bytes(self._buffer[1 : start - 2])
            if start < 2 or self._buffer[:1] != b"$" or not digits.isdigit() or int(digits) < _LARGE:
                if not n_read:
                    raise RedisConnectionError("the server closed the connection")
                self._reader.feed(self._buffer, 0, n_read)
                return None
            return self._receive(int(digits), memoryview(self._buffer)[start:n_read])
        except TimeoutError as error:
            raise RedisTimeoutError("the value did not come in time") from error
        except OSError as error:
            raise RedisConnectionError(f"the connection broke: {type(error).__name__}") from None

    def _receive(self, size: int, begin: memoryview) -> memoryview:
        """The string of `size` bytes that begins with `begin`, and the line break after it off the socket too."""
        view, n_read = np.empty(size + 2, dtype=np.uint8).data, min(len(begin), size + 2)
        view[:n_read] = begin[:n_read]
        while n_read < size + 2:
            n_more = self._sock.recv_into(view[n_read:])
            if not n_more:
                raise RedisConnectionError("the server closed the connection in the middle of a value")
            n_read += n_more
        if bytes(view[size:]) != b"\r\n" or len(begin) > size + 2:
            raise RedisConnectionError("the server's answer is out of step")
        return view[:size]


BlobParser: Any = _BlobParser if HIREDIS_AVAILABLE else DefaultParser


def blob_packer(connection: Any) -> Any:
    """What makes a command's bytes: it passes large arguments on as they are."""
    return PythonRespSerializer(_PACKED_BYTES, connection.encoder.encode)
