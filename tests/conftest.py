"""For all tests: those of `tests/clients` run when they are asked for (`make test-clients`), not with the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

CLIENTS = Path(__file__).with_name("clients")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = any(Path(arg.partition("::")[0]).resolve().is_relative_to(CLIENTS) for arg in config.args)
    return True if collection_path == CLIENTS and not asked else None
