"""For all tests: those of `tests/clients`, `tests/page` and `tests/stack/running` run when they are asked for, not with
the rest (`make test-clients`, `test-page`, `test-stack`); Triton's kernels run under its interpreter without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before any test can do that

APART = {Path(__file__).parent / name for name in ("clients", "page", "stack/running")}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path not in APART:
        return None
    asked = any(Path(arg.partition("::")[0]).resolve().is_relative_to(collection_path) for arg in config.args)
    return None if asked else True
