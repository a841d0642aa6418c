"""schemathesis over the served OpenAPI description: no 5xx, and no answer that is not described.

By its command line, as its pytest plugin is written for older releases of pytest than ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from stemcache.api.server_process import ServerProcess

pytest.importorskip("schemathesis", reason="make test-clients installs it")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # A context of 256 tokens: what a random request asks for is soon generated.
    with ServerProcess("--dtype", "float32", "--pool-bytes", "512KiB") as process:
        process.wait_until_ready(timeout=600)
        yield process.url


@pytest.mark.timeout(3600)
def test_answers_are_as_described(url: str, run_from_page: Callable[..., str]) -> None:
    assert "Coverage" in run_from_page("schemathesis", url)
