"""Limits: how much one request may ask for, and how large it may be.

Invariant: a body larger than the limit is never held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stemcache.api.errors import ApiError, error_response


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server puts up with. How long a prompt may be is the model's and the pool's business (`max_model_len`).

    body_bytes: of one request's body. A context of 128k tokens is a megabyte as text or as token ids.
    choices: of one request, prompts times `n`.
    queue: requests of one tenant that wait to be started, above which new ones are refused.
    documents: of one tenant.
    seconds: from a request's arrival to the end of its answer; None for no limit.
    """

    body_bytes: int = 16 << 20
    choices: int = 512
    queue: int = 512
    documents: int = 100_000
    seconds: float | None = 600.0


class BodyTooLargeError(ApiError):
    """More bytes than the limit."""

    status = 413
    code = "request_too_large"

    def __init__(self, limit: int) -> None:
        # The rest of the body is not read, so the connection cannot be used again.
        super().__init__(
            f"The request body has more than the {limit} bytes that this server takes; split it, or raise --max-body.",
            {"Connection": "close"},
        )


class BodyLimitMiddleware:
    """Reads bodies, up to the limit, before anybody else does."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self._app = app
        self._limit = limits.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope).get("content-length"), receive)
        except BodyTooLargeError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, announced: str | None, receive: Receive) -> bytes:
        # Compared by length first, as Python refuses to read a number of some thousand digits.
        if announced is not None and (len(announced) > 18 or int(announced) > self._limit):
            raise BodyTooLargeError(self._limit)
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self._limit:
                raise BodyTooLargeError(self._limit)
            if not message.get("more_body", False):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives `body` once, then what `receive` gives: the disconnect."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed
