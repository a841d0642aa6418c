"""Server-sent events, as OpenAI streams them: one `data:` event a chunk, `[DONE]` at the end.

Invariant: an event stream owns its generation. However the stream ends (all sent, an error, the client gone), the
generation's requests have ended with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stemcache.api.disconnect import until_disconnect
from stemcache.api.errors import describe
from stemcache.api.generation import Generation

_log = logging.getLogger(__name__)

DONE: Final = b"data: [DONE]\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One event. JSON has no raw line breaks, so one `data:` line always holds it."""
    return (
        b"data: " + json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
    )


class EventStream(Response):
    """Sends `chunks`, which read from `generation`.

    A response class of its own and not Starlette's StreamingResponse, because that one drops an iterator which it never
    started when the client is gone by then, and with it the clean-up.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, chunks: AsyncIterator[Mapping[str, Any]]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation:
            try:
                await until_disconnect(self._send(send), receive)
            except ClientDisconnect:
                _log.info("client went away during its stream")

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for message in self._events():
            await send({"type": "http.response.body", "body": message, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield event(chunk)
        except Exception as error:  # the status line is sent: what is left is to say it inside the stream
            reply = describe(error)
            # What has a name was foreseen, and the answer says all of it.
            _log.warning("a stream ended with an error: %s", reply.message, exc_info=reply.code is None)
            yield event(reply.body)
        yield DONE
