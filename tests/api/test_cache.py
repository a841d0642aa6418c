"""The cache routes and commands on a real server, 256 chunks of 16 tokens; and that the manual shows what it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from forked import ForkedServer
from waiting import until

from stemcache.api.cache_answers import (
    CacheClear,
    CacheExplanation,
    CachePin,
    CachePins,
    CacheRequests,
    CacheStatistics,
    CacheTree,
    CacheUnpin,
    CacheWarm,
)
from stemcache.api.cli import main
from stemcache.api.server_process import ServerProcess, free_port

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "cache-administration.md"
DATED = (
    "You answer questions about the {name}. Today is {day}. The harbor has three cranes. The tower has a bell. "
    "The bridge is closed in winter. The library is open on Sunday. The museum has a garden."
)


@pytest.fixture(scope="module")
def small() -> Iterator[ServerProcess]:
    """With the least recently used to go: these tests say what is evicted, and when."""
    options = ("--dtype", "float32", "--pool-bytes", "8MiB", "--chunk-tokens", "16", "--show-cache-text")
    options += ("--eviction", "lru")
    with ForkedServer(*options) as process:
        process.wait_until_ready()
        yield process


@pytest.fixture
def cache(small: ServerProcess) -> Iterator[httpx.Client]:
    """A client of an empty cache; the test leaves no pin."""
    with httpx.Client(base_url=small.url, trust_env=False, timeout=60) as client:
        client.post("/v1/cache/clear").raise_for_status()
        yield client
        assert client.get("/v1/cache/pin").json()["data"] == []
        until_idle(client)


def until_idle(client: httpx.Client) -> None:
    """A chat's conversation may still be read for its next turn when the answer is there."""
    until(lambda: client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0})


def post(client: httpx.Client, route: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/cache/{route}", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def flood(client: httpx.Client) -> None:
    """Fill the whole pool with other prompts."""
    for start in range(10):
        post(client, "warm", prompt=[50 + (start * 17 + i * (start + 3)) % 300 for i in range(480)])


# -- explain ---------------------------------------------------------------------------------------------------------


def test_explain_names_the_date_that_changed(cache: httpx.Client) -> None:
    post(cache, "warm", prompt=DATED.format(name="port", day="2026-11-20"))
    told = post(cache, "explain", prompt=DATED.format(name="port", day="2026-11-21"))
    assert (told["divergence"]["prompt"], told["divergence"]["cached"]) == ("2026-11-21", "2026-11-20")
    token = told["divergence"]["token"]
    assert told["advice"][0].startswith(
        f"The prompt differs at token {token}, '2026-11-21' against '2026-11-20': put what changes after what does not."
    )
    assert {each["reason"] for each in told["ranges"]} >= {"hit", "other_position", "last_token"}
    assert sum(each["tokens"] for each in told["ranges"]) == told["prompt_tokens"]
    assert told["cached_tokens"] == token


def test_explain_foretells_the_usage_of_a_chat(cache: httpx.Client) -> None:
    documents = [{"title": f"Page {i}", "text": DATED.format(name=i, day="Monday")} for i in range(2)]
    body: dict[str, Any] = {"documents": documents, "max_tokens": 2, "temperature": 0}
    for question in ("What has the tower?", "What has the harbor?", "What has the harbor?"):
        request = body | {"messages": [{"role": "user", "content": question}]}
        until_idle(cache)
        told = post(cache, "explain", **request)
        usage = cache.post("/v1/chat/completions", json=request).json()["usage"]
        assert usage["prompt_tokens"] == told["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == told["cached_tokens"]
    assert told["cached_tokens"] > 0.9 * told["prompt_tokens"]


def test_salts_have_caches_of_their_own(cache: httpx.Client) -> None:
    prompt = DATED.format(name="harbor", day="2026-11-20")
    warmed = post(cache, "warm", prompt=prompt, cache_salt="x")
    assert warmed["newly_cached_tokens"] > 48
    assert post(cache, "explain", prompt=prompt, cache_salt="x")["cached_tokens"] >= 48
    told = post(cache, "explain", prompt=prompt)
    assert told["cached_tokens"] == 0
    assert {each["reason"] for each in told["ranges"]} >= {"other_namespace"}
    assert "another cache_salt of yours" in told["advice"][0]
    body = {"prompt": prompt, "max_tokens": 1, "cache_salt": "x"}
    usage = cache.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == warmed["newly_cached_tokens"]
    pin = post(cache, "pin", prompt=prompt, cache_salt="x")
    for salt, count in (("x", 1), ("", 0)):
        query = {"cache_salt": salt}
        assert len(cache.get("/v1/cache/pin", params=query).json()["data"]) == count
        assert (
            cache.get("/v1/cache/tree", params=query).json()["cached_tokens"] == count * warmed["newly_cached_tokens"]
        )
        own = cache.get("/v1/cache/stats", params=query).json()["tenant"]
        assert own["pins"]["count"] == count
    assert refusal(cache.delete(f"/v1/cache/pin/{pin['id']}"), 404)["code"] == "pin_not_found"
    assert cache.delete(f"/v1/cache/pin/{pin['id']}", params={"cache_salt": "x"}).json()["deleted"]
    assert cache.post("/v1/cache/clear").json()["cleared_tokens"] == 0
    assert cache.post("/v1/cache/clear", params={"cache_salt": "x"}).json()["cleared_tokens"] >= 48


def test_answers_are_as_described(cache: httpx.Client) -> None:
    prompt = {"prompt": DATED.format(name="harbor", day="2026-11-20")}
    CacheWarm.model_validate(cache.post("/v1/cache/warm", json=prompt).json())
    CacheExplanation.model_validate(cache.post("/v1/cache/explain", json=prompt).json())
    pin = CachePin.model_validate(cache.post("/v1/cache/pin", json=prompt).json())
    CachePins.model_validate(cache.get("/v1/cache/pin").json())
    CacheStatistics.model_validate(cache.get("/v1/cache/stats").json())
    CacheRequests.model_validate(cache.get("/v1/cache/requests").json())
    for query in ({}, {"text": "true"}):
        CacheTree.model_validate(cache.get("/v1/cache/tree", params=query).json())
    CacheUnpin.model_validate(cache.delete(f"/v1/cache/pin/{pin.id}").json())
    CacheClear.model_validate(cache.post("/v1/cache/clear").json())


def test_what_was_cleared_is_told_from_what_is_new(cache: httpx.Client) -> None:
    prompt = DATED.format(name="quay", day="Tuesday")
    assert post(cache, "explain", prompt=prompt)["ranges"][0]["reason"] == "never_seen"
    warmed = post(cache, "warm", prompt=prompt)
    assert warmed["newly_cached_tokens"] == warmed["prompt_tokens"] // 16 * 16
    assert post(cache, "clear")["cleared_tokens"] == warmed["newly_cached_tokens"]
    told = post(cache, "explain", prompt=prompt)
    assert (told["ranges"][0]["reason"], told["divergence"]) == ("evicted", None)
    assert "were cached here before and went" in told["advice"][0]


# -- warm, pin, clear ------------------------------------------------------------------------------------------------


def test_a_warm_prompt_is_found(cache: httpx.Client) -> None:
    prompt = DATED.format(name="pier", day="Wednesday")
    first, again = post(cache, "warm", prompt=prompt), post(cache, "warm", prompt=prompt)
    assert first["cached_tokens"] == again["newly_cached_tokens"] == 0
    assert again["cached_tokens"] == first["newly_cached_tokens"] > 16
    answer = cache.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == first["newly_cached_tokens"]


def test_a_pin_holds_against_a_flood_and_ends(cache: httpx.Client) -> None:
    prompt, other = (DATED.format(name=name, day="Thursday") for name in ("mole", "dock"))
    pin = post(cache, "pin", prompt=prompt)
    post(cache, "warm", prompt=other)
    assert pin["pinned_tokens"] == pin["newly_cached_tokens"] == pin["prompt_tokens"] // 16 * 16
    assert pin["expires_in_seconds"] is None
    flood(cache)
    post(cache, "clear")
    assert post(cache, "explain", prompt=prompt)["cached_tokens"] == pin["pinned_tokens"]
    assert post(cache, "explain", prompt=other)["cached_tokens"] < pin["pinned_tokens"]
    assert [each["id"] for each in cache.get("/v1/cache/pin").json()["data"]] == [pin["id"]]
    stats = cache.get("/v1/cache/stats").json()["tenant"]
    assert stats["pins"] == {"count": 1, "tokens": pin["pinned_tokens"]}
    ended = cache.delete(f"/v1/cache/pin/{pin['id']}").json()
    assert ended == {"id": pin["id"], "object": "cache.pin", "deleted": True}
    error = refusal(cache.delete(f"/v1/cache/pin/{pin['id']}"), 404)
    assert error["code"] == "pin_not_found"
    assert post(cache, "clear")["cleared_tokens"] == pin["pinned_tokens"]


def test_a_pin_ends_by_itself(cache: httpx.Client) -> None:
    post(cache, "pin", prompt=DATED, ttl_seconds=0.05)
    until(lambda: not cache.get("/v1/cache/pin").json()["data"])


def test_pins_hold_half_of_the_pool(cache: httpx.Client) -> None:
    prompts = [[start + i % 7 for i in range(960)] for start in (60, 70, 80)]  # 60 chunks each, of 256
    pins = [post(cache, "pin", prompt=prompt) for prompt in prompts[:2]]
    error = refusal(cache.post("/v1/cache/pin", json={"prompt": prompts[2]}))
    assert error["code"] == "pin_limit_exceeded"
    assert "needs 60 chunks; pins may hold 128 of the pool and hold 120 already" in error["message"]
    for pin in pins:
        cache.delete(f"/v1/cache/pin/{pin['id']}")


# -- stats and tree --------------------------------------------------------------------------------------------------


def test_the_statistics_add_up(cache: httpx.Client) -> None:
    before = cache.get("/v1/cache/stats").json()["tenant"]
    prompt = DATED.format(name="lock", day="Friday")
    warmed = [post(cache, "warm", prompt=prompt) for _ in range(2)]
    stats = cache.get("/v1/cache/stats").json()
    pool, own = stats["tiers"]["device"], stats["tenant"]
    assert pool["chunks"]["free"] + pool["chunks"]["cached"] + pool["chunks"]["private"] == pool["chunks"]["total"]
    assert pool["bytes"]["cached"] == pool["tokens"]["cached"] * stats["bytes_per_token"]
    assert own["tiers"]["device"]["tokens"]["cached"] == warmed[0]["newly_cached_tokens"]
    assert own["prompts"] - before["prompts"] == 2
    assert own["hit_tokens"] - before["hit_tokens"] == warmed[1]["cached_tokens"]
    assert sum(own["misses"].values()) == own["miss_tokens"]
    assert own["hit_tokens"] + own["miss_tokens"] - before["hit_tokens"] - before["miss_tokens"] == 2 * (
        warmed[0]["prompt_tokens"] - 1
    )


def test_the_latest_requests_are_told(cache: httpx.Client) -> None:
    before = cache.get("/v1/cache/requests", params={"limit": 1}).json()["data"]
    prompt = DATED.format(name="berth", day="Sunday")
    post(cache, "warm", prompt="Only read, so there is no first token of it. " * 3)
    usages = [cache.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()["usage"] for _ in range(2)]
    flood(cache)
    usages.append(cache.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1}).json()["usage"])
    latest = cache.get("/v1/cache/requests").json()["data"]
    first = latest[0]["number"] - 2
    assert first == (before[0]["number"] if before else 0) + 1
    assert [each["number"] for each in latest[:3]] == [first + 2, first + 1, first]
    for each, usage in zip(latest, reversed(usages), strict=False):
        assert each["prompt_tokens"] == usage["prompt_tokens"]
        assert each["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
        assert 0 < each["first_token_seconds"] < each["first_token_seconds"] + each["age_seconds"]
    assert latest[0]["evicted_tokens"] == latest[1]["cached_tokens"] > 0 == latest[1]["evicted_tokens"]
    told = cache.get("/v1/cache/stats").json()["tenant"]["first_token"]
    assert told["cached"]["requests"] + told["computed"]["requests"] == len(latest)
    assert told["cached"]["median_seconds"] > 0 < told["computed"]["median_seconds"]
    assert cache.get("/v1/cache/requests", params={"cache_salt": "elsewhere"}).json()["data"] == []
    assert len(cache.get("/v1/cache/requests", params={"limit": 2}).json()["data"]) == 2
    for query, param in (("limit=0", "limit"), ("limit=201", "limit"), ("x=1", "x")):
        assert refusal(cache.get(f"/v1/cache/requests?{query}"))["param"] == param
    assert refusal(cache.get("/v1/cache/stats?documents=1001"))["param"] == "documents"


def test_the_tree_is_bounded_and_its_text_is_whole(cache: httpx.Client) -> None:
    for name in ("gate", "wall", "moat"):
        post(cache, "warm", prompt=DATED.format(name=name, day="Saturday"))
    tree = cache.get("/v1/cache/tree", params={"text": True}).json()
    assert tree["shown_tokens"] == tree["cached_tokens"] == sum(node["tokens"] for node in tree["nodes"])
    texts = {None: ""}
    for node in tree["nodes"]:
        texts[node["id"]] = texts[node["parent"]] + node["text"]
    ends = [texts[node["id"]] for node in tree["nodes"] if not node["children"]]
    assert len(ends) == 3
    for name in ("gate", "wall", "moat"):
        whole = DATED.format(name=name, day="Saturday")
        assert any(whole.startswith(end) and name in end for end in ends)
    for limit in (1, 3, 5):
        part = cache.get("/v1/cache/tree", params={"max_nodes": limit}).json()
        assert part["shown_tokens"] == 16 * limit
        assert "text" not in part["nodes"][0]
    assert cache.get("/v1/cache/tree", params={"depth": 1}).json()["shown_tokens"] <= 16 * 3


def test_text_is_shown_only_where_the_server_allows_it(http: httpx.Client) -> None:
    error = refusal(http.get("/v1/cache/tree", params={"text": True}), 403)
    assert "--show-cache-text" in error["message"]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["explain", "warm", "pin"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["one", "two"]}, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"prompt": "x", "colour": "red"}, "colour"),
        ({"prompt": "x", "model": "another"}, "model"),
        ([1, 2], None),
    ],
)
def test_prompts_that_are_refused(cache: httpx.Client, route: str, body: object, param: str | None) -> None:
    error = refusal(cache.post(f"/v1/cache/{route}", json=body), 404 if param == "model" else 400)
    assert error["param"] == param


@pytest.mark.parametrize("ttl", [0, -1, "5", True, 1e12])
def test_times_that_are_refused(cache: httpx.Client, ttl: object) -> None:
    error = refusal(cache.post("/v1/cache/pin", json={"prompt": DATED, "ttl_seconds": ttl}))
    assert error["param"] == "ttl_seconds"


def test_only_a_pin_has_a_time(cache: httpx.Client) -> None:
    error = refusal(cache.post("/v1/cache/warm", json={"prompt": DATED, "ttl_seconds": 5}))
    assert (error["param"], error["code"]) == ("ttl_seconds", "unsupported_parameter")


@pytest.mark.parametrize("query", ["max_nodes=0", "max_nodes=5001", "max_nodes=x", "depth=0", "text=maybe", "width=3"])
def test_queries_that_are_refused(cache: httpx.Client, query: str) -> None:
    assert refusal(cache.get(f"/v1/cache/tree?{query}"))["param"] == query.split("=")[0]


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.usefixtures("wide")
def test_explain_on_the_command_line(
    cache: httpx.Client, small: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    post(cache, "warm", prompt=DATED.format(name="[red]fort", day="2026-11-20"))
    file = tmp_path / "prompt.txt"
    file.write_text(DATED.format(name="[red]fort", day="2026-11-21"))
    assert main(["explain", str(file), "--url", small.url]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\d+ of \d+ prompt tokens are cached \(\d+%\)", printed)
    assert re.search(r"^0 to \d+ +hit +hit +You answer", printed, re.MULTILINE)
    assert re.search(r"^prompt at token \d+ .*\[red\]fort\. Today is 2026-11-21$", printed, re.MULTILINE)
    assert re.search(r"^cached at token \d+ .*\[red\]fort\. Today is 2026-11-20$", printed, re.MULTILINE)
    assert "'2026-11-21' against '2026-11-20': put what changes after what does not." in printed


@pytest.mark.parametrize(
    "text",
    ["What has the tower?", '[{"role": "user", "content": "Hi"}]', '{"messages": [{"role": "user", "content": "Hi"}]}'],
)
def test_explain_a_chat_on_the_command_line(
    cache: httpx.Client, small: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "chat"
    file.write_text(text)
    assert main(["explain", "--chat", str(file), "--url", f"{small.url}/v1/"]) == 0
    assert "prompt tokens are cached" in capsys.readouterr().out


@pytest.mark.usefixtures("wide")
def test_the_tree_on_the_command_line(
    cache: httpx.Client, small: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("keep", "yard"):
        post(cache, "warm", prompt=DATED.format(name="tree", day="Sunday") + f" The {name} and its walls are old." * 3)
    assert main(["tree", "--text", "--url", small.url]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"\d+ tokens cached, in chunks of 16\n", printed)
    assert len(re.findall(r"[├└]── \d+ tokens  idle \d+ s  \S", printed)) == 3
    assert main(["tree", "--max-nodes", "1", "--url", small.url]) == 0
    assert re.search(r"└── … \d+ more\n", capsys.readouterr().out)


def test_without_a_server_it_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    for command in (["explain", str(file)], ["tree"]):
        assert main([*command, "--url", url]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"stemcache: no server answers at {url} (")
        assert "start one with `stemcache serve`" in line


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2"])
def test_files_that_hold_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    file = tmp_path / "prompt"
    file.write_bytes(content)
    assert main(["explain", "--chat", str(file)]) == 2
    assert main(["explain", "--chat", str(tmp_path / "missing")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_refusal_is_one_sentence(
    small: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: httpx.Client
) -> None:
    assert main(["tree", "--max-nodes", "9999", "--url", small.url]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("stemcache: the server refuses: Invalid value for 'max_nodes'")


# -- the manual ------------------------------------------------------------------------------------------------------


def examples() -> Iterator[tuple[str, str, str, Any]]:
    """(method, path, request body, answer) of every example in the manual, in order."""
    pattern = r"```http\n(\w+) (\S+)\n(.*?)```\s+```json\n(.*?)```"
    for method, path, body, answer in re.findall(pattern, MANUAL.read_text(), re.DOTALL):
        yield method, path, body, json.loads(answer)


def shape(value: Any) -> Any:
    """What does not depend on tokenizer and moment: no numbers, ids and excerpts; of a list, the first element."""
    if isinstance(value, dict):
        return {name: "" if name in ("id", "text") else shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    if isinstance(value, str):
        return re.sub(r"\d+", "0", value)
    return value if value is None or isinstance(value, bool) else 0


def test_the_manuals_examples_are_what_the_server_says(cache: httpx.Client) -> None:
    found = list(examples())
    assert len(found) == 8
    for _ in range(2):  # one that is computed and one that is cached, which the examples tell of
        cache.post("/v1/completions", json={"prompt": [9, *range(60, 120)], "max_tokens": 1}).raise_for_status()
    cache.post("/v1/cache/clear").raise_for_status()
    for method, path, body, answer in found:
        response = cache.request(method, path, content=body, headers={"Content-Type": "application/json"})
        assert shape(response.json()) == shape(answer), path
    for pin in cache.get("/v1/cache/pin").json()["data"]:
        cache.delete(f"/v1/cache/pin/{pin['id']}")
