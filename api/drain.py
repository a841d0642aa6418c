"""Draining: the end of a server's life, in which it finishes what runs and takes nothing new.

Invariant: once begun, it only ends: no request that arrives later is served, and `is_done` says when the last one that
came before has its answer.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from stemcache.api.errors import ApiError, error_response


class ShuttingDownError(ApiError):
    """The server is about to end."""

    status = 503
    type = "server_error"
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__(
            "The server is shutting down and takes no new requests: send it to another, or try again later.",
            {"Connection": "close", "Retry-After": "5"},
        )


class Drain:
    """Whether the server still takes requests, and how many it works on."""

    def __init__(self) -> None:
        self.open_requests = 0
        self.has_begun = False

    def begin(self) -> None:
        """Take nothing new. Also to be called from a signal handler."""
        self.has_begun = True

    @property
    def is_done(self) -> bool:
        return self.has_begun and not self.open_requests


class DrainMiddleware:
    """Counts the requests that are served, and refuses those that come too late. Metrics can be read to the end."""

    def __init__(self, app: ASGIApp, *, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._drain.has_begun and scope["path"] != "/metrics":
            return await error_response(ShuttingDownError())(scope, receive, send)
        self._drain.open_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.open_requests -= 1
