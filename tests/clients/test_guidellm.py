"""guidellm: a short load run, of which every request succeeds and has as many tokens as were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("guidellm", reason="make test-clients installs it")


def test_a_load_run_has_no_failed_request(run_from_page: Callable[..., str], tmp_path: Path) -> None:
    run_from_page("guidellm")
    [benchmark] = json.loads((tmp_path / "guidellm.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (16, 0, 0)
    answered = [request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"]]
    assert answered == [16] * 16
