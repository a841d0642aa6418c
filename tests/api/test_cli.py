"""The command line: answers on stdout, one sentence for a user's mistake, an orderly end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forked import ForkedServer, run_command

from stemcache import Engine, SamplingParams
from stemcache.api.cli import _parser, main
from stemcache.api.loading import load_engine
from stemcache.api.server_process import ServerProcess, ServerStartError
from stemcache.prefixtree.eviction import LRU
from stemcache.prefixtree.fading_pgdsf import FadingPGDSF


def test_generate_prints_the_engines_text(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "The code of", "--max-tokens", "12", "--dtype", "float32", "--pool-bytes", "64MiB"]) == 0
    printed = capsys.readouterr()
    [expected] = engine.generate(["The code of"], SamplingParams(max_tokens=12, temperature=0))
    assert printed.out == expected.text + "\n"
    assert f"{len(engine.encode('The code of'))} prompt tokens (0 cached)" in printed.err


def test_eviction_and_queue_reach_the_engine() -> None:
    for arguments, policy, by_cache in (
        ([], FadingPGDSF, True),
        (["--eviction", "lru"], LRU, True),
        (["--queue", "fcfs"], FadingPGDSF, False),
    ):
        with load_engine(_parser().parse_args(["serve", "--pool-bytes", "16MiB", *arguments])) as engine:
            assert type(engine._loop.store._ledger.tree._policy) is policy
            assert (engine._loop.scheduler.waiting._cached_share is not None) is by_cache


@pytest.mark.parametrize("config", [None, "{", "{}", '{"model_type": "llama"}', '{"model_type": "no_such_model"}'])
def test_a_broken_model_folder_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str | None
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert main(["generate", "hello", "--model", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    assert printed.err.strip().splitlines()[-1].startswith("stemcache: ")
    assert str(tmp_path) in printed.err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "hello", "--model", "./no/such/folder"]) == 2
    assert "no model folder at './no/such/folder'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--max-tokens", "-1"], ["--temperature", "nan"], ["--pool-bytes", "1"]])
def test_values_that_the_engine_refuses(capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    assert main(["generate", "hello", *option]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("stemcache: ")


@pytest.mark.parametrize(
    "arguments",
    [[], ["bake"], ["serve", "--port", "70000"], ["serve", "--pool-bytes", "2G"], ["serve", "--chunk-tokens", "5"]]
    + [["serve", "--max-queue", "0"], ["serve", "--request-timeout", "1.5"], ["serve", "--max-body", "lots"]]
    + [
        ["serve", "--eviction", "fifo"],
        ["serve", "--queue", "lifo"],
        ["simulate", "--k", "0"],
        ["simulate", "--seeds"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_does_not_wait_for_torch() -> None:
    code = """
import sys
from stemcache.api.cli import _parser, main
from stemcache.api.loading import load_engine
try:
    main(["generate", "--help"])
finally:
    print("heavy:", {"torch", "transformers", "fastapi"} & sys.modules.keys())
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("usage: stemcache generate")
    assert printed.endswith("heavy: set()\n")


def test_a_taken_port_is_one_sentence(server: ServerProcess) -> None:
    ended = run_command("serve", "--port", str(server.port))
    assert ended.returncode == 2
    assert ended.stderr == f"stemcache: cannot listen on 127.0.0.1:{server.port}: another program uses the port\n"


def test_a_server_that_cannot_start_says_why() -> None:
    with ForkedServer("--host", "256.0.0.1") as process, pytest.raises(ServerStartError, match="cannot listen on 256"):
        process.wait_until_ready()
