"""schemathesis over the served OpenAPI description: no 5xx, and no answer that is not described.

By its command line, as its pytest plugin is written for older releases of pytest than ours.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stemcache.api.server_process import ServerProcess

pytest.importorskip("schemathesis", reason="make test-clients installs it")

EXAMPLES = 8
# A schema cannot say all that a request must be: that a token id lies in the vocabulary, that a prompt fits. So not
# everything that fits the schema is accepted; what is refused must be refused in the described form.
EXCLUDED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # A context of 256 tokens: what a random request asks for is soon generated.
    with ServerProcess("--dtype", "float32", "--pool-bytes", "512KiB") as process:
        process.wait_until_ready(timeout=600)
        yield process.url


def test_answers_are_as_described(url: str, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    limits = ["--max-examples", str(EXAMPLES), "--seed", "1", "--request-timeout", "120"]
    run = subprocess.run(
        [program, "run", f"{url}/openapi.json", "--exclude-checks", EXCLUDED, *limits],
        cwd=tmp_path,  # where it keeps what it has found
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
