"""The tests of the openai package once more, with its other major release.

litellm wants openai 2, so 3 is installed into a folder of its own, which comes first on the path of the run that
uses it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

TESTS = Path(__file__).with_name("test_openai.py")


@pytest.mark.timeout(1800)
def test_the_other_major_release(tmp_path: Path) -> None:
    other = 2 if openai.__version__.startswith("3.") else 3
    subprocess.run(
        [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", tmp_path]
        + [f"openai>={other},<{other + 1}"],
        check=True,
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OPENAI_MAJOR": str(other)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
