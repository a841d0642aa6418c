"""For all tests: those of `tests/clients` run when they are asked for (`make test-clients`), not with the rest;
Triton's kernels run under its interpreter where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before any test can do that

CLIENTS = Path(__file__).with_name("clients")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = any(Path(arg.partition("::")[0]).resolve().is_relative_to(CLIENTS) for arg in config.args)
    return True if collection_path == CLIENTS and not asked else None
