"""Moved documents over HTTP, and the check that comes before them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest
from forked import ForkedServer

from stemcache.api.answers import ChatAnswer, ErrorAnswer
from stemcache.api.blending import switch_on_blending
from stemcache.api.cli import _parser, main
from stemcache.api.document_service import open_documents
from stemcache.api.server_process import ServerProcess
from stemcache.api.settings import Settings
from stemcache.engine.demo import MODEL_PATH
from stemcache.engine.demo.facts import SYSTEM_PROMPT, is_right, random_corpus
from stemcache.engine.engine import Engine
from stemcache.engine.errors import BlendRefusedError, InvalidRequestError
from stemcache.ragcache.calibration import demo_questions

FACTS = random_corpus(Random(78), 5)
ENGINE = ("--dtype", "float32", "--pool-bytes", "16MiB", "--chunk-tokens", "16")


def write_questions(path: Path, **changes: Any) -> Path:
    records = []
    for question in demo_questions(50, documents=(2, 3)):
        record = asdict(question) | changes
        record["documents"] = [{"title": title, "text": text} for title, text in question.documents]
        records.append(json.dumps(record))
    path.write_text("\n".join(records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where questions and verdicts are, instead of the user's own cache folder."""
    folder = tmp_path_factory.mktemp("blend")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def blending(folder: Path) -> Iterator[ServerProcess]:
    questions = write_questions(folder / "questions.jsonl")
    with ForkedServer(*ENGINE, "--blend", "--blend-questions", str(questions)) as process:
        process.wait_until_ready()
        assert "documents may be moved" in process.output()
        yield process


def body_of(order: list[int], question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    documents = [{"title": FACTS[i].title, "text": FACTS[i].text} for i in order]
    rag = {"reuse": "blend"}
    return {"messages": messages, "documents": documents, "temperature": 0, "max_tokens": 24, "rag": rag} | fields


def moved_in_total(client: httpx.Client) -> float:
    """Also those of the check, which every server counts."""
    found = re.search(r"^stemcache_moved_tokens_total (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_documents_in_another_order_are_moved(blending: ServerProcess) -> None:
    with httpx.Client(base_url=blending.url, trust_env=False, timeout=60) as client:
        moved = moved_in_total(client)
        for order in ([0, 1, 2, 3], [3, 1, 0, 2], [4, 2, 0, 1]):
            fact = FACTS[order[-1]].facts[0]
            response = client.post("/v1/chat/completions", json=body_of(order, fact.question))
            assert response.status_code == 200, response.text
            ChatAnswer.model_validate(response.json())
            answer = response.json()
            told = answer["rag"]["documents"]
            assert [each["reuse"] for each in told] == ["all", "moved", "moved", "moved"]
            for each in told:
                assert each["cached_tokens"] + each["moved_tokens"] + each["computed_tokens"] == each["tokens"]
            details = answer["usage"]["prompt_tokens_details"]
            assert details["moved_tokens"] == sum(each["moved_tokens"] for each in told) > 80
            moved += details["moved_tokens"]
            assert is_right(fact, answer["choices"][0]["message"]["content"])
            plain = client.post("/v1/chat/completions", json=body_of(order, fact.question, rag={})).json()
            assert "moved_tokens" not in plain["usage"]["prompt_tokens_details"]
            assert not any(each["moved_tokens"] for each in plain["rag"]["documents"])
        assert moved_in_total(client) == moved
        refused = client.post("/v1/chat/completions", json=body_of([0, 1], "What?", prompt_logprobs=1))
        assert ErrorAnswer.model_validate(refused.json()).error.param == "prompt_logprobs"


def test_streams_tell_it_in_their_first_chunk(blending: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{blending.url}/v1", api_key="none", max_retries=0) as client:
        body = body_of([2, 0, 1], FACTS[0].facts[0].question)
        extra = {name: body.pop(name) for name in ("documents", "rag")}
        first, *_ = client.chat.completions.create(model=MODEL_PATH.name, stream=True, extra_body=extra, **body)
        assert first.model_extra is not None
        assert [each["reuse"] for each in first.model_extra["rag"]["documents"]][1:] == ["moved", "moved"]


def test_blend_check(blending: ServerProcess, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (verdict,) = (folder / "stemcache" / "blend").glob("*.json")
    before = verdict.stat().st_mtime_ns
    assert main(["blend-check", *ENGINE, "--blend-questions", str(folder / "questions.jsonl")]) == 0
    assert "Documents may be moved in stemcache-demo: " in capsys.readouterr().out
    assert verdict.stat().st_mtime_ns == before, "it was the server's verdict"
    wrong = write_questions(folder / "wrong.jsonl", answer="never said")
    assert main(["blend-check", "--dtype", "float32", "--pool-bytes", "16MiB", "--blend-questions", str(wrong)]) == 1
    assert "0 of 50 questions answered right with 15%" in capsys.readouterr().out


def test_what_blend_check_cannot_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blend-check", "--model", str(MODEL_PATH)]) == 2
    assert "--blend-questions" in capsys.readouterr().err
    assert main(["blend-check", "--blend-questions", str(folder / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for share in ("-0.1", "1.5", "nan", "much"):
        with pytest.raises(SystemExit):
            main(["blend-check", "--blend-share", share])
        assert "not a number from 0 to 1" in capsys.readouterr().err


def test_a_server_that_fails_the_check_does_not_start(folder: Path, engine: Engine) -> None:
    """The verdict may be that of `test_blend_check`: the model and its chunks are the same."""
    wrong = write_questions(folder / "wrong.jsonl", answer="never said")
    settings = Settings.read({"XDG_CACHE_HOME": str(folder)})

    def serve(*options: str) -> None:
        parsed = _parser().parse_args(["serve", *options])
        with open_documents(parsed, settings, engine) as documents:
            switch_on_blending(parsed, settings, documents)
            assert documents is not None
            assert documents.blending.verdict is None

    serve()
    with pytest.raises(BlendRefusedError, match="documents are not moved in this model: 0 of 50 questions"):
        serve("--blend", "--blend-questions", str(wrong))
    with pytest.raises(InvalidRequestError, match="stemcache\\[rag\\]"):
        switch_on_blending(_parser().parse_args(["serve", "--blend"]), settings, None)
