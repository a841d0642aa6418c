"""Admission: the way from HTTP into the engine. Every prompt takes it.

Invariant: what the engine is given carries the tenant that the request's key stands for and keeps to the limits; the
fields of the body can narrow where it finds chunks (`cache_salt`), never widen it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stemcache.api.context import current
from stemcache.api.errors import ApiError
from stemcache.api.limits import Limits
from stemcache.api.metrics import Metrics
from stemcache.api.recent import RecentRequests
from stemcache.api.watched_stream import WatchedStream
from stemcache.engine.errors import InvalidRequestError
from stemcache.engine.sampling import SamplingParams
from stemcache.prefixtree.expected import NOTHING

if TYPE_CHECKING:
    from stemcache.api.keys import Tenant
    from stemcache.api.schemas import SamplingRequest
    from stemcache.engine.blend import Blend
    from stemcache.engine.engine import Engine
    from stemcache.engine.stream import Stream
    from stemcache.engine.tentative import Tentative
    from stemcache.prefixtree.expected import Expected
    from stemcache.ragcache.preparation import Prepared

_AFTER_ALL_OTHERS = 1 << 62  # a priority that no request has


class QueueFullError(ApiError):
    """Too many of the tenant's requests wait already."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, waiting: int, seconds: int) -> None:
        super().__init__(
            f"{waiting} of your requests are waiting already; send this one again in {seconds} s.",
            {"Retry-After": str(seconds)},
        )


class Throughput:
    """How fast requests have been coming to their end lately."""

    SHORTEST, LONGEST, UNKNOWN = 1, 60, 5  # seconds to tell a client

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=64)

    def count(self) -> None:
        """Note that a request has ended."""
        self._ends.append(self._clock())

    def seconds_for(self, n: int) -> int:
        """In how many seconds `n` more will have ended, for a Retry-After header."""
        if len(self._ends) < 2:
            return self.UNKNOWN
        elapsed = self._clock() - self._ends[0]
        return min(self.LONGEST, max(self.SHORTEST, math.ceil(n * elapsed / (len(self._ends) - 1))))


class Admission:
    """Lets requests into the engine of one application."""

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits, *, log_prompts: bool = False) -> None:
        self._engine = engine
        self._metrics = metrics
        self._limits = limits
        self._log_prompts = log_prompts
        self.recent = RecentRequests()
        self._throughput = Throughput()
        self._live: dict[Tenant, set[WatchedStream]] = {}

    def admit(self, body: SamplingRequest, n_prompts: int) -> Admitted:
        """Let the running request, whose body this is, submit its prompts.

        Raises InvalidRequestError for more choices than the limit, QueueFullError.
        """
        choices = n_prompts * body.choices_generated
        if choices > self._limits.choices:
            raise InvalidRequestError(
                f"{choices} choices (prompts times 'n' or 'best_of') are more than the {self._limits.choices} that one "
                "request may ask for; send several requests.",
                param="n" if n_prompts == 1 else "prompt",
            )
        context = current()
        assert context.tenant is not None, "authentication comes before admission"
        waiting = sum(stream.waits for stream in self._live.get(context.tenant, ()))
        if waiting >= self._limits.queue:
            raise QueueFullError(waiting, self._throughput.seconds_for(waiting))
        if self._log_prompts:
            context.prompt = body.model_dump(include={"prompt", "messages", "documents"}, exclude_none=True)
        salt = (body.cache_salt or "").encode()
        return Admitted(self, context.tenant, salt, body.priority or 0)

    def submit(
        self,
        admitted: Admitted,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        blend: Blend | None = None,
        expected: Expected = NOTHING,
        submitted: Stream | None = None,
    ) -> WatchedStream:
        """Submit one prompt of an admitted request, unless it was. Raises what `Engine.submit` raises."""
        context, tenant = current(), admitted.tenant
        stream = submitted or self._submit(admitted, prompt, params, blend=blend, expected=expected)
        watched = WatchedStream(stream, context, self._metrics, self._limits.seconds, lambda it: self._end(tenant, it))
        watched.on_first_token = lambda seconds: self.recent.note(
            tenant.id, admitted.cache_salt, watched.usage, seconds
        )
        context.streams.append(watched)
        self._live.setdefault(tenant, set()).add(watched)
        return watched

    def submit_tentatively(
        self, admitted: Admitted, prepared: Prepared, params: SamplingParams, tentative: Tentative
    ) -> Stream:
        """Submit a prompt of which it is not known yet whether it is the request's; from any thread."""
        return self._submit(admitted, prepared.tokens, params, expected=prepared.expected, tentative=tentative)

    def read(self, admitted: Admitted, prompt: Sequence[int]) -> None:
        """Have the engine read a prompt into the tenant's cache, after whatever the tenant waits for.

        Nobody waits for it, so no limit counts it. Raises what `Engine.submit` raises.
        """
        self._engine.submit(
            prompt,
            SamplingParams(max_tokens=0),
            tenant=admitted.tenant.id,
            cache_salt=admitted.cache_salt,
            priority=_AFTER_ALL_OTHERS,
        )

    def _submit(
        self,
        admitted: Admitted,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        blend: Blend | None = None,
        expected: Expected = NOTHING,
        tentative: Tentative | None = None,
    ) -> Stream:
        return self._engine.submit(
            prompt,
            params,
            tenant=admitted.tenant.id,
            cache_salt=admitted.cache_salt,
            priority=admitted.priority,
            blend=blend,
            expected=expected,
            tentative=tentative,
        )

    def _end(self, tenant: Tenant, stream: WatchedStream) -> None:
        self._live[tenant].remove(stream)
        if not self._live[tenant]:
            del self._live[tenant]
        self._throughput.count()


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request's leave to submit its prompts."""

    admission: Admission
    tenant: Tenant
    cache_salt: bytes
    priority: int

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        blend: Blend | None = None,
        expected: Expected = NOTHING,
        submitted: Stream | None = None,
    ) -> WatchedStream:
        """submitted: the prompt's stream, if it has one already. Raises what `Engine.submit` raises."""
        return self.admission.submit(self, prompt, params, blend=blend, expected=expected, submitted=submitted)

    def submit_tentatively(self, params: SamplingParams, prepared: Prepared, tentative: Tentative) -> Stream:
        """From any thread. Raises what `Engine.submit` raises."""
        return self.admission.submit_tentatively(self, prepared, params, tentative)

    def read(self, prompt: Sequence[int]) -> None:
        """Have a prompt read into the cache; nobody waits for it. Raises what `Engine.submit` raises."""
        self.admission.read(self, prompt)
