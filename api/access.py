"""Access: the outermost layer. Gives each request its id, and at its end tells the log, the metrics and the tracer.

Invariant: every answer carries `X-Request-Id`, errors and refusals too, and every request has one line in the log, in
which no text of a prompt stands unless that was asked for.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stemcache.api import context
from stemcache.api.context import RequestContext
from stemcache.api.errors import CLIENT_CLOSED_REQUEST, error_response
from stemcache.api.metrics import Metrics
from stemcache.api.tracing import Spans

_log = logging.getLogger("stemcache.access")
_failures = logging.getLogger(__name__)

REQUEST_ID: Final = "X-Request-Id"
_GOOD_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Asked for every few seconds, the last three by the live page; their successes are for debugging.
_PROBES: Final = frozenset({"/health", "/metrics", "/v1/cache/stats", "/v1/cache/tree", "/v1/cache/requests"})


class AccessMiddleware:
    """To be added last, so that it is outside of everything else."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, spans: Spans | None) -> None:
        self._app = app
        self._metrics = metrics
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        request = RequestContext(_request_id(headers.get(REQUEST_ID)), scope["method"], scope["path"])
        answer = _Answer(request, send)
        token = context.enter(request)
        try:
            await self._serve(answer, scope, receive)
        finally:
            self._tell(request, answer.status or CLIENT_CLOSED_REQUEST, scope, headers)
            context.leave(token)

    async def _serve(self, answer: _Answer, scope: Scope, receive: Receive) -> None:
        """Nothing is raised further: the server could log it, but not under the request's id."""
        try:
            await self._app(scope, receive, answer.send)
        except ClientDisconnect:
            pass
        except Exception as error:
            _failures.exception("a request failed")
            if answer.status is None:
                await error_response(error)(scope, receive, answer.send)

    def _tell(self, request: RequestContext, status: int, scope: Scope, headers: Headers) -> None:
        route = getattr(scope.get("route"), "path", "none")
        outcome, usage = request.outcome(status), request.usage
        self._metrics.request(route, outcome)
        fields: dict[str, Any] = {
            "method": request.method,
            "path": request.path,
            "status": status,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - request.started, 6),
        }
        if request.streams:
            fields |= {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
            }
            if self._spans is not None:
                self._spans.record(request, route, outcome, headers)
        if request.prompt is not None:
            fields["prompt"] = request.prompt
        level = logging.DEBUG if request.path in _PROBES and status < 400 else logging.INFO
        _log.log(level, "%s %s %d", request.method, request.path, status, extra={"fields": fields})


class _Answer:
    """Sends an answer on, with the request's id in its headers."""

    def __init__(self, request: RequestContext, send: Send) -> None:
        self.status: int | None = None
        self._request = request
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self._request.request_id
        await self._send(message)


def _request_id(given: str | None) -> str:
    """The client's own, if it is harmless in a log and a header; else a new one."""
    return given if given is not None and _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
