"""Waiting in tests for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(holds: Callable[[], Any]) -> None:
    """Return when `holds()` is true. AssertionError where it is not within two minutes: machines are busy, and no test
    is about times."""
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
