"""For all tests: those of `tests/clients`, `tests/page` and `tests/stack/running` run when they are asked for, not with
the rest (`make test-clients`, `test-page`, `test-stack`); Triton's kernels run under its interpreter without a GPU."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples each time, so that a change is what makes a test fail; `make explore` looks for others.
# No deadlines: machines are busy, and no test is about times.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")

# Here and not later, as Triton reads it when it is imported, which a conftest further down may do; and without torch,
# which the controller of pytest-xdist need not wait for.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"

APART = {Path(__file__).parent / name for name in ("clients", "page", "stack/running")}


def pytest_collection() -> None:
    """A torch that cannot use the GPU that is there; the controller of pytest-xdist, which imports no tests, need not
    know."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: the garbage collector, which some tests call, need not look through it
    each time."""
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path not in APART:
        return None
    asked = any(Path(arg.partition("::")[0]).resolve().is_relative_to(collection_path) for arg in config.args)
    return None if asked else True
