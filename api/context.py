"""The request context: what is known of the HTTP request that the running task serves.

Invariant: every HTTP request has exactly one, from its first byte to the last of its answer; what runs outside of one
and asks for it fails, so that nothing is ever generated for nobody.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stemcache.engine.outputs import Usage

if TYPE_CHECKING:
    from stemcache.api.keys import Tenant
    from stemcache.api.watched_stream import WatchedStream

Outcome = Literal["completed", "cancelled", "timeout", "refused", "rejected", "failed"]


@dataclass(slots=True, eq=False)
class RequestContext:
    """One HTTP request. `started` in seconds of `time.perf_counter`.

    tenant: None until the key was checked.
    streams: what was generated for it, one a prompt.
    ended: how its generation ended, unless it was completed.
    prompt: the text that was asked with; set only where it may be logged.
    """

    request_id: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    tenant: Tenant | None = None
    streams: list[WatchedStream] = field(default_factory=list)
    ended: Outcome | None = None
    prompt: Any = None

    @property
    def usage(self) -> Usage:
        """The sums over its prompts."""
        usages = [stream.usage for stream in self.streams]
        return Usage(
            sum(usage.prompt_tokens for usage in usages),
            sum(usage.completion_tokens for usage in usages),
            sum(usage.cached_tokens for usage in usages),
        )

    def outcome(self, status: int) -> Outcome:
        """What became of it, by the status of its answer: refused is the client's doing, rejected is the load's."""
        match status:
            case 499:
                return "cancelled"
            case 504:
                return "timeout"
            case 429 | 503:
                return "rejected"
            case _ if status >= 400:
                return "failed" if status >= 500 else "refused"
            case _:
                return self.ended or "completed"


_current: ContextVar[RequestContext] = ContextVar("stemcache_request")


def current() -> RequestContext:
    """The context of the request that is being served. Raises LookupError outside of one."""
    return _current.get()


def current_or_none() -> RequestContext | None:
    return _current.get(None)


enter = _current.set
leave = _current.reset
