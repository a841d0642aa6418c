"""What the documents say can be run, and what they point to is there."""

from __future__ import annotations

import contextlib
import gc
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import ForkedServer

from stemcache import __version__
from stemcache.api.cli import _parser
from stemcache.engine.demo import MODEL_PATH

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
# Programs with libraries that only `make test-clients` installs, which runs them.
ELSEWHERE = {
    "clients.md",
    "haystack.md",
    "langchain.md",
    "llamaindex.md",
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ForkedServer() as server:
        server.wait_until_ready()
        yield server.url


def programs() -> dict[str, str]:
    """All Python that a reader is shown, by where it stands."""
    found = {}
    for document in (each for each in DOCUMENTS if each.name not in ELSEWHERE):
        blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
        found |= {f"{document.stem} block {i}": block for i, block in enumerate(blocks)}
    return found | {path.name: path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))}


# Short programs leave their connections to the end of the process, which here comes later.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", programs())
def test_programs_run_as_they_stand(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the places that are the reader's own are filled in: the server's address, the model's name and folder."""
    code = programs()[name].replace("http://127.0.0.1:8000", url).replace('"path/to/checkpoint"', repr(str(MODEL_PATH)))
    code = code.replace('model="checkpoint"', f'model="{MODEL_PATH.name}"')
    printed = io.StringIO()
    monkeypatch.setattr(sys, "argv", [name])
    with contextlib.redirect_stdout(printed):  # in this process: importing torch anew takes longer than most of them
        exec(compile(code, name, "exec", dont_inherit=True), {"__name__": "__main__"})
    gc.collect()  # connections, and pools of engines, which are as large as a reader's
    assert re.search(r"\d", printed.getvalue()), "it printed no figure"


def commands() -> list[tuple[str, str]]:
    """All command lines of ours that a reader is shown, and the document."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:sh)?\n(.*?)```", document.read_text(), re.DOTALL):
            found += [(document.name, line) for line in re.findall(r"^stemcache (.*)", block, re.MULTILINE)]
    return found


@pytest.mark.parametrize(("name", "line"), commands())
def test_command_lines_are_understood(name: str, line: str) -> None:
    _parser().parse_args(shlex.split(line.replace("...", "host"), comments=True))


def test_examples_are_short() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 30, path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", path.read_text(), re.MULTILINE))
        assert {a or b for a, b in named} <= targets, path.name


def test_the_changelog_knows_the_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
