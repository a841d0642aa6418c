"""`stemcache bench`: figures that agree with the server's own, a chart, and one sentence for what goes wrong."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import httpx
import pytest

from stemcache.api import cli
from stemcache.api.bench_chart import chart
from stemcache.api.server_process import ServerProcess, free_port

SMALL = ["--requests", "8", "--documents", "3", "--k", "2", "--document-words", "40", "--max-tokens", "4"]


def counted(http: httpx.Client, name: str) -> float:
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_the_figures_are_the_servers(
    server: ServerProcess, http: httpx.Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("stemcache_prompt_tokens_total", "stemcache_generation_tokens_total")
    before = [counted(http, name) for name in names]
    files = tmp_path / "bench.json", tmp_path / "bench.svg"
    assert cli.main(["bench", "--url", server.url, *SMALL, "--json", str(files[0]), "--chart", str(files[1])]) == 0
    printed = capsys.readouterr().out
    samples = json.loads(files[0].read_text())["requests"]
    assert len(samples) == 8
    assert all(0 < each["ttft"] <= each["total"] for each in samples)
    after = [counted(http, name) for name in names]
    prompts, generated = (now - then for now, then in zip(after, before, strict=True))
    assert generated == sum(each["completion_tokens"] for each in samples)
    # An answer that the chat template would write with other tokens is read again, ahead of the next turn.
    assert sum(each["prompt_tokens"] for each in samples) <= prompts <= 2 * sum(s["prompt_tokens"] + 8 for s in samples)
    assert sum(each["cached_tokens"] > 0 for each in samples) >= 5, "three documents, eight requests"
    for row in ("mostly cached", "mostly computed", "all"):
        assert row in printed
    circles = ElementTree.parse(files[1]).getroot().findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 8


def test_a_seed_asks_the_same_again(server: ServerProcess, tmp_path: Path) -> None:
    counts = []
    for name in ("first", "second"):
        file = tmp_path / name
        assert cli.main(["bench", "--url", server.url, *SMALL, "--seed", "5", "--json", str(file)]) == 0
        samples = json.loads(file.read_text())["requests"]
        counts.append((sum(s["prompt_tokens"] for s in samples), sum(s["cached_tokens"] for s in samples)))
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] > counts[0][1], "all of it was cached by then"


def test_what_cannot_be_measured_is_one_sentence(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--url", f"http://127.0.0.1:{free_port()}"]) == 2
    assert "no server answers at" in capsys.readouterr().err
    long = ["bench", "--url", server.url, "--document-words", "3000", "--requests", "1"]
    assert cli.main(long) == 2
    assert capsys.readouterr().err.endswith("answered 400 to a request\n")


@pytest.mark.parametrize("points", [[], [(0, 0.0)], [(1, 1e-6), (10**6, 900.0)]])
def test_any_points_make_a_chart(points: list[tuple[int, float]]) -> None:
    assert ElementTree.fromstring(chart(points)).tag.endswith("svg")
