"""The comparison with other servers, on ours alone: it is asked, answers in full, and is reported."""

from __future__ import annotations

import asyncio
import random
import sys
from itertools import chain
from pathlib import Path

import psutil
import pytest
from peers import __main__ as program
from peers.checkpoint import TINY, build_tokenizer, text_of
from peers.drive import AnswerError, Client
from peers.report import compare, rows
from peers.server import Server, ServerError

from stemcache.api.server_process import free_port

ANSWERS_SHORT = """
import http.server, json, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
        self.wfile.write(b"data: " + json.dumps({"choices": [{"index": 0, "text": " one two"}]}).encode() + b"\\n\\n")
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def small_server(code: str) -> Server:
    port = free_port()
    return Server([sys.executable, "-c", code, str(port)], port, {})


def test_ours_through_the_whole_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "INSTALLED", tmp_path)
    found = program.main(["--quick", "--only", "stemcache", "--rounds", "2", "--workloads", "samples", "conversations"])
    assert [len(found[name]["stemcache"]) for name in ("samples", "conversations")] == [2, 2]
    assert all(seconds > 0 for round_ in found["samples"]["stemcache"] for seconds in round_["until all are there"])
    assert "conversations: TTFT from turn 2" in capsys.readouterr().out


def test_a_word_is_a_token_wherever_it_stands() -> None:
    tokenizer = build_tokenizer(TINY["vocab_size"])
    rng = random.Random(0)
    for _ in range(50):
        parts = [text_of(rng, rng.randrange(1, 40)) for _ in range(4)]
        ids = [tokenizer(part).input_ids for part in parts]
        assert [len(each) for each in ids] == [len(part.split()) for part in parts]
        assert tokenizer("".join(parts)).input_ids == [*chain.from_iterable(ids)]
        assert tokenizer.decode(ids[0]) == parts[0]


def test_an_answer_that_is_too_short_is_an_error_and_its_server_leaves_nothing_behind() -> None:
    with small_server(ANSWERS_SHORT) as server:
        server.start(timeout=30)
        server.stop()
        server.start(timeout=30)  # the workload that restarts it does the same
        processes = server._tree()
        assert len(processes) == 2
        assert server.memory_bytes() > 0 < server.peak_bytes()

        async def ask(words: int) -> tuple[str, ...]:
            async with Client(server.url, "any", honours_n=True) as client:
                return (await client.ask("prompt", words)).texts

        assert asyncio.run(ask(2)) == (" one two",)
        with pytest.raises(AnswerError, match="3 words were asked for"):
            asyncio.run(ask(3))
        server.pause()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_server_that_ends_says_why() -> None:
    with small_server("raise SystemExit('no such model')") as server, pytest.raises(ServerError, match="no such model"):
        server.start(timeout=30)


def test_ratios_are_of_rounds_and_above_one_where_we_are_ahead() -> None:
    found = {
        "ours": [{"TTFT": [1.0, 3.0], "tokens/s": [10.0]}, {"TTFT": [2.0, 2.0], "tokens/s": [20.0]}],
        "theirs": [{"TTFT": [4.0, 4.0], "tokens/s": [20.0]}, {"TTFT": [6.0, 6.0], "tokens/s": [5.0]}],
    }
    ttft, speed = compare("w", found, "ours")
    assert ttft.ours == 2.0
    assert ttft.ratios == {"theirs": (2.0, 2.5, 3.0)}
    assert speed.ratios == {"theirs": (0.5, 2.25, 4.0)}
    assert rows([ttft], ["theirs", "absent"]) == [["w: TTFT", "2.000", "2.50 (2.00-3.00)", "-"]]
