"""The comparison with other servers, on ours alone: it is asked, answers in full, and is reported."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path

import harness
import psutil
import pytest
from peers import __main__ as program
from peers import measured as saved_runs
from peers.checkpoint import TINY, build_tokenizer, text_of
from peers.commands import PEERS, Peer, Settings
from peers.contest import Contest, Contestant, start
from peers.drive import AnswerError, Client
from peers.measured import Measured, SavedRunError
from peers.page import markdown
from peers.report import compare, rows
from peers.server import Server
from peers.workloads import QUICK, Figures, Sizes, Workload

from stemcache.api.server_process import ServerStartError, free_port

TOY = """
import http.server, json, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET()
        words = " word" * (1 if body["prompt"] == "too hard for " + sys.argv[2] else body["max_tokens"])
        self.wfile.write(b"data: " + json.dumps({"choices": [{"index": 0, "text": words}]}).encode() + b"\\n\\n")
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""Answers with as many words as are asked for; with one only where the prompt says that it is too hard for it."""


def small_server(code: str, name: str = "toy") -> Server:
    port = free_port()
    return Server([sys.executable, "-c", code, str(port), name], port, {})


@pytest.mark.sweep
def test_ours_through_the_whole_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "INSTALLED", tmp_path)
    arguments = ["--quick", "--only", "stemcache", "--rounds", "2", "--workloads", "samples", "few sharers"]
    measured = program.main(arguments)
    found = measured.rounds
    assert measured.setup["shape"] == "tiny"
    assert [len(found[name]["stemcache"]) for name in ("samples", "few sharers")] == [2, 2]
    assert all(seconds > 0 for round_ in found["samples"]["stemcache"] for seconds in round_["until all are there"])
    assert "| few sharers: last TTFT |" in capsys.readouterr().out


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
    with small_server(TOY) as server:
        server.start(timeout=30)
        server.stop()
        server.start(timeout=30)  # the workload that restarts it does the same
        processes = server._tree()
        assert len(processes) == 2
        assert server.memory_bytes() > 0 < server.peak_bytes()

        async def ask(prompt: str) -> tuple[str, ...]:
            async with Client(server.url, "any", honours_n=True) as client:
                return (await client.ask(prompt, 3)).texts

        assert asyncio.run(ask("easy")) == (" word word word",)
        with pytest.raises(AnswerError, match="3 words were asked for"):
            asyncio.run(ask("too hard for toy"))
        server.pause()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_a_server_that_ends_says_why() -> None:
    fails = small_server("raise SystemExit('no such model')")
    with fails as server, pytest.raises(ServerStartError, match="no such model"):
        server.start(timeout=30)


async def ask_one(client: Client, prompt: str) -> Figures:
    return {"TTFT": [(await client.ask(prompt, 3)).ttft]}


async def easy(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    return await ask_one(client, "easy")


async def hard(client: Client, server: Server, rng: random.Random, sizes: Sizes) -> Figures:
    return await ask_one(client, "too hard for weak")


EASY, HARD = Workload("easy", easy), Workload("hard", hard)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(saved_runs, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def contestants() -> Iterator[list[Contestant]]:
    """Two toys, started and paused."""
    with ExitStack() as stack:
        found = []
        for name in ("weak", "strong"):
            server = stack.enter_context(small_server(TOY, name))
            server.start(timeout=30)
            server.pause()
            found.append(Contestant(replace(PEERS["llama.cpp"], name=name), server, "any"))
        yield found


def contest(contestants: list[Contestant], measured: Measured, rounds: int, minutes: float = 60) -> None:
    run = Contest(list(contestants), measured, QUICK, rounds, minutes, measured.save)
    asyncio.run(run.run([EASY, HARD]))


def test_who_fails_at_a_workload_is_started_afresh_for_the_others(
    contestants: list[Contestant], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = Measured({"shape": "tiny", "dtype": "float32"})
    weak = contestants[0].server._tree()[0].pid
    contest(contestants, measured, rounds=2)
    assert {name: len(rounds) for name, rounds in measured.rounds["easy"].items()} == {"weak": 2, "strong": 2}
    assert {name: len(rounds) for name, rounds in measured.rounds["hard"].items()} == {"strong": 2}
    assert "3 words were asked for" in measured.failures["hard"]["weak"]
    assert contestants[0].server._tree()[0].pid != weak
    assert all(each.server._tree()[0].status() == psutil.STATUS_STOPPED for each in contestants)
    assert "weak fails at hard" in capsys.readouterr().out


def test_a_run_that_was_broken_off_goes_on(contestants: list[Contestant], results: Path) -> None:
    first = Measured({"shape": "tiny", "dtype": "float32", "sizes": {"at_once": (1, 8)}})
    contest(contestants, first, rounds=3, minutes=0)
    assert {len(rounds) for servers in first.rounds.values() for rounds in servers.values()} == {1}, "no time for more"
    again = Measured.load("tiny", "float32")
    again.require_setup(first.setup)
    assert again.rounds == first.rounds
    assert again.failures == first.failures
    before = again.rounds["easy"]["weak"][0]
    contest(contestants, again, rounds=2)
    assert [len(again.rounds["easy"][name]) for name in ("weak", "strong")] == [2, 2]
    assert again.rounds["easy"]["weak"][0] == before
    with pytest.raises(SavedRunError, match="another sizes"):
        again.require_setup(first.setup | {"sizes": {"at_once": (1, 9)}})
    with pytest.raises(SavedRunError, match="start a run without --resume"):
        Measured.load("tiny", "bfloat16")


def test_who_does_not_start_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ends(settings: Settings, port: int) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('no such model')"]

    absent = Peer("absent", tmp_path / "nothing", ends, lambda: "1")
    broken = Peer("broken", tmp_path, ends, lambda: "1")
    settings = Settings(tmp_path, "float32", 1, 1, 1, tmp_path)
    with ExitStack() as stack:
        assert asyncio.run(start(stack, [absent, broken], settings, Measured({}))) == []
    printed = capsys.readouterr().out
    assert "absent is left out, as it is not installed" in printed
    assert "broken is left out: the server ended with status 1: no such model" in printed


def test_the_page_names_what_is_missing() -> None:
    ours = {"TTFT of a known prompt": [1.0]}
    measured = Measured(
        {"shape": "tiny", "dtype": "float32", "kv_tokens": 4096},
        versions={"stemcache-disk": "1", "vllm": "2"},
        rounds={"restart": {"stemcache-disk": [ours], "vllm": [{"TTFT of a known prompt": [3.0]}]}},
        failures={"samples": {"vllm": "it took more than 240 s"}},
    )
    page = markdown(measured)
    assert "| restart: TTFT of a known prompt | 1.000 | 3.00 |" in page
    assert "vllm failed at samples: it took more than 240 s" in page


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
