"""For the tests of real clients: real server processes on the demo model, and the programs of docs/clients.md."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import FactDocument, random_corpus
from stemcache.engine.engine import Engine
from stemcache.engine.sampling import SamplingParams

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
# Nothing may be fetched: prices, models, data sets, usage statistics.
OFFLINE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
}
os.environ.update(OFFLINE)


def pytest_configure(config: pytest.Config) -> None:
    """LangChain's standard tests have coroutines. Not in pyproject.toml: the plain run has no pytest-asyncio."""
    if config.pluginmanager.hasplugin("asyncio"):
        config.option.asyncio_mode = "auto"


# The demo model's own template knows no tools. This one shows them, and writes calls, in the form of Hermes and Qwen;
# and it shows what tools answer.
TOOLS_SHOWN = "{%- if tools -%}{{ '<|system|>As <tool_call>: ' + tools | tojson + '<|end|>' }}{%- endif -%}"
ROLES, ROLES_AND_TOOL = "['user', 'assistant']", "['user', 'assistant', 'tool']"


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--dtype", "float32", "--pool-bytes", "128MiB") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="session")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model, named "caller", with a template that has a place for tools."""
    folder = tmp_path_factory.mktemp("tools") / "caller"
    shutil.copytree(MODEL_PATH, folder)
    template = folder / "chat_template.jinja"
    assert ROLES in template.read_text()
    template.write_text(TOOLS_SHOWN + template.read_text().replace(ROLES, ROLES_AND_TOOL))
    with ServerProcess("--model", str(folder), "--dtype", "float32", "--pool-bytes", "64MiB") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with Engine.load(MODEL_PATH, dtype="float32", pool_bytes=64 << 20) as loaded:
        yield loaded


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def async_http() -> httpx.AsyncClient:
    """Keeps no connections: each test has an event loop of its own, and a connection belongs to the one it began in."""
    return httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0))


@pytest.fixture
def corpus(request: pytest.FixtureRequest) -> list[FactDocument]:
    """Documents that no other test uses, so that what is cached is what the test itself asked for."""
    return random_corpus(random.Random(request.node.nodeid), 3)


@pytest.fixture
def documents(corpus: list[FactDocument]) -> list[dict[str, str]]:
    return [document.as_template_document() for document in corpus]


@pytest.fixture
def question(corpus: list[FactDocument]) -> str:
    return corpus[1].facts[0].question


@pytest.fixture
def expected(engine: Engine) -> Callable[..., str]:
    """The engine's answer to a question with documents, each a title and a text: 24 tokens at most."""

    def answer(question: str, documents: list[dict[str, str]], system: str = "") -> str:
        before = [{"role": "system", "content": system}] if system else []
        ids = engine.encode_chat([*before, {"role": "user", "content": question}], documents=documents)
        [completion] = engine.generate([ids], SamplingParams(max_tokens=24, temperature=0))
        return completion.text

    return answer


@pytest.fixture
def run_from_page(server: ServerProcess, tmp_path: Path) -> Callable[..., str]:
    """Runs the program that docs/clients.md shows under a heading, in `tmp_path`; returns what it printed."""

    def run(heading: str, url: str = server.url) -> str:
        section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        [(language, program)] = re.findall(r"```(python|sh)\n(.*?)```", section, re.DOTALL)
        assert len(program.splitlines()) < 12, "the page says it briefly"
        program = program.replace("http://127.0.0.1:8000", url).replace("path/to/checkpoint", str(MODEL_PATH))
        program = re.sub(r"\bcheckpoint\b", MODEL_PATH.name, program)
        command = [sys.executable, "-c", program] if language == "python" else ["sh", "-e", "-c", program]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        caches = {"HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | caches | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=3000,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def migration(page: str) -> str:
    """What a page of docs/ shows to put in place of what the reader has: one or two lines."""
    [lines] = re.findall(r"```diff\n(.*?)```", PAGE.with_name(f"{page}.md").read_text(), re.DOTALL)
    added = [line[1:] for line in lines.splitlines() if line.startswith("+")]
    assert len(added) <= 2
    return "\n".join(added)


@pytest.fixture
def migrated() -> Callable[..., dict[str, Any]]:
    """Runs a page's lines of migration among the given names; returns the names that there are then."""

    def run(page: str, **names: Any) -> dict[str, Any]:
        exec(migration(page), names)
        return names

    return run


@pytest.fixture
def run_page(server: ServerProcess) -> Callable[[str], str]:
    """Runs the program of a page of docs/ as it stands, but for the server's address; returns what it printed."""

    def run(page: str) -> str:
        [program, *_] = re.findall(r"```python\n(.*?)```", PAGE.with_name(f"{page}.md").read_text(), re.DOTALL)
        assert len(program.splitlines()) < 30, "the page promises a short one"
        program = program.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
