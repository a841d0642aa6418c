"""The circuit breaker: when to leave a failing server in peace, and when to ask it again.

Invariant: while it is open nobody but the one prober asks the server. It opens after three failures in a row, or when
half of the last twenty calls failed; it closes when a probe succeeds. Probes are spaced by a doubling, jittered time,
so that a fleet of clients does not fall upon a server that has just come back.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

IN_A_ROW: Final = 3
WINDOW: Final = 20
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0


class CircuitBreaker:
    """Counts the outcomes of calls. Closed at first. Methods may be called from any thread.

    clock: seconds, never going back. rng: where the jitter comes from.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        self._lock = threading.Lock()
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self._pause = FIRST_PAUSE
        self._probe_at: float | None = None
        self.opened = 0  # how often

    @property
    def is_open(self) -> bool:
        return self._probe_at is not None

    @property
    def probe_in(self) -> float | None:
        """Seconds until the next probe is due, 0 or less when it is; None while closed."""
        at = self._probe_at
        return None if at is None else at - self._clock()

    def succeeded(self) -> None:
        """Note a call, or a probe, that the server answered."""
        with self._lock:
            self._in_a_row = 0
            if self._probe_at is None:
                self._recent.append(True)
            else:
                self._recent.clear()
                self._probe_at, self._pause = None, FIRST_PAUSE

    def failed(self) -> None:
        """Note a call, or a probe, that failed."""
        with self._lock:
            if self._probe_at is not None:  # the probe, or a call that began before it opened
                if self._probe_at <= self._clock():
                    self._pause = min(LONGEST_PAUSE, 2 * self._pause)
                    self._schedule()
                return
            self._in_a_row += 1
            self._recent.append(False)
            failures = self._recent.count(False)
            if self._in_a_row >= IN_A_ROW or (len(self._recent) == WINDOW and 2 * failures >= WINDOW):
                self._open(FIRST_PAUSE)

    def trip(self, pause: float = FIRST_PAUSE) -> None:
        """Open at once, for what will not get better by asking again."""
        with self._lock:
            if self._probe_at is None:
                self._open(pause)

    def _open(self, pause: float) -> None:
        self.opened += 1
        self._pause = pause
        self._schedule()

    def _schedule(self) -> None:
        self._probe_at = self._clock() + self._pause * self._rng.uniform(0.5, 1.0)


class Prober:
    """A thread that asks a server anew whenever its breaker's next probe is due.

    probe: returns if the server answers, raises if it does not.
    """

    def __init__(self, breaker: CircuitBreaker, probe: Callable[[], None], name: str) -> None:
        self._breaker = breaker
        self._probe = probe
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look at the breaker: it may have opened."""
        self._wake.set()

    def close(self) -> None:
        """End the thread, after the probe that is running. Does not wait for it."""
        self._closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._breaker.probe_in)
            self._wake.clear()
            due = self._breaker.probe_in
            if self._closed or due is None or due > 0:
                continue
            try:
                self._probe()
            except Exception:
                self._breaker.failed()
            else:
                self._breaker.succeeded()
