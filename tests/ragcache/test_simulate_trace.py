"""Reading traces, and the command `stemcache simulate` on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from stemcache.api.cli import main
from stemcache.ragcache.simulate_trace import TraceError, read_trace

DOCUMENTS = [
    '{"documents": [{"id": "a", "tokens": 900}, {"id": 7, "tokens": 30}], "question_tokens": 12}',
    "",
    '{"documents": [{"id": 7, "tokens": 30}]}',
    '{"documents": []}',
]
MOONCAKE = [
    json.dumps({"timestamp": at, "input_length": 1100, "output_length": 9, "hash_ids": ids})
    for at, ids in enumerate([[0, 1, 2], [0, 1, 3], [0, 1, 2]])
]


def test_documents() -> None:
    trace = read_trace("t", DOCUMENTS, system_tokens=3)
    assert (trace.lengths, trace.requests, trace.questions) == ([900, 30], [(0, 1), (1,), ()], [12, 100, 100])
    assert (trace.orderable, trace.system_tokens) == (True, 3)


def test_mooncake() -> None:
    trace = read_trace("t", MOONCAKE)
    assert (trace.lengths, trace.requests) == ([512] * 4, [(0, 1, 2), (0, 1, 3), (0, 1, 2)])
    assert (trace.orderable, trace.questions) == (False, [0, 0, 0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: Expecting"),
        (["[1]"], "line 1: "),
        (["3"], "line 1: "),
        ([DOCUMENTS[0], '{"question": 1}'], "line 2: documents is missing"),
        (['{"documents": [{"id": "a"}]}'], "tokens is missing"),
        (['{"documents": [{"id": "a", "tokens": 0}]}'], "from 1 on, not 0"),
        (['{"documents": [{"id": "a", "tokens": "9"}]}'], "not '9'"),
        (['{"documents": [{"id": ["a"], "tokens": 9}]}'], "an id must be"),
        (['{"documents": [{"id": "a", "tokens": 9}, {"id": "a", "tokens": 9}]}'], "twice"),
        ([DOCUMENTS[2], '{"documents": [{"id": 7, "tokens": 31}]}'], "another length"),
        (['{"documents": [], "question_tokens": -1}'], "from 0 on"),
        (['{"hash_ids": 5}'], "line 1: "),
        (['{"hash_ids": [null]}'], "an id must be"),
        ([DOCUMENTS[0], MOONCAKE[0]], "mixes"),
        ([" "], "holds no request"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said(lines: list[str], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace("t", lines)


def test_the_command_on_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, figures, drawing = tmp_path / "trace.jsonl", tmp_path / "figures.json", tmp_path / "chart.svg"
    trace.write_text("\n".join(MOONCAKE))
    command = ["simulate", "--trace", str(trace), "--capacity-tokens", "4096", "--json", str(figures)]
    assert main([*command, "--chart", str(drawing), "--backlog", "2"]) == 0
    printed = capsys.readouterr().out
    rates = {each["setup"]: each["document_rates"] for each in json.loads(figures.read_text())["figures"]}
    assert rates["lru"] == [round(5 / 9, 5)]
    assert all(name in printed for name in rates)
    assert any("cache queue" in name for name in rates)
    assert ElementTree.parse(drawing).getroot().tag.endswith("svg")


def test_the_command_on_synthetic_workloads(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--requests", "30", "--documents", "200", "--k", "1", "3", "--seeds", "1", "2", "--max-shift", "1"]
    assert main(["simulate", *small, "--capacity-tokens", "100000"]) == 0
    printed = capsys.readouterr().out
    for word in ("k=1, static", "k=3, drift", "pgdsf+gate, cache order (shift 1)", "bound, any order", "±"):
        assert word in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "no/such/file"], "No such file"),
        (["--capacity-tokens", "100"], "has no chunk"),
        (["--k", "30"], "no such workload: k must be"),
    ],
)
def test_mistakes_are_one_sentence(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--requests", "3", "--documents", "200", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_a_binary_file_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace").write_bytes(b"\xff\xfe\x00")
    assert main(["simulate", "--trace", str(tmp_path / "trace")]) == 2
    assert "is no text" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import sys, stemcache.api.simulate; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
