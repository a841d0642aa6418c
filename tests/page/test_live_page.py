"""The live page in a real browser, while a real server answers real requests."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from stemcache.api import cli
from stemcache.api.server_process import ServerProcess
from stemcache.engine.demo.facts import SYSTEM_PROMPT, FactDocument

Visit = Callable[..., Page]
SMALL = ("--dtype", "float32", "--pool-bytes", "16MiB")
SECRET = "Zanzibar keeps its cranes in the harbor by the old tower, and nobody knows why. " * 3


def warm(client: httpx.Client, text: str, **fields: object) -> int:
    answer = client.post("/v1/cache/warm", json={"prompt": text, **fields})
    return int(answer.raise_for_status().json()["newly_cached_tokens"])


def complete(client: httpx.Client, text: str) -> None:
    client.post("/v1/completions", json={"prompt": text, "max_tokens": 2}).raise_for_status()


def add(client: httpx.Client, corpus: list[FactDocument]) -> None:
    documents = [{"id": f"doc {i}", "title": each.title, "text": each.text} for i, each in enumerate(corpus)]
    client.post("/v1/documents", json={"documents": documents}).raise_for_status()


def boxes(page: Page) -> list[str]:
    """What a screen reader is told of the tree's blocks, from the top."""
    return [each.get_attribute("aria-label") or "" for each in page.locator("#tree [role=treeitem]").all()]


def test_it_draws_what_is_cached_and_grows_while_requests_run(
    visit: Visit, server: ServerProcess, client: httpx.Client
) -> None:
    page = visit(server.url)
    expect(page.locator("#state")).to_have_text("live")
    expect(page.locator("#model")).to_have_text("stemcache-demo")
    expect(page.locator("#tree-empty")).to_be_visible()
    shared = "You answer questions about the harbor, its cranes and its tower. " * 4
    ends = "Who has the bell of the tower?", "Why is the bridge closed in winter, and for how long?"
    cached = warm(client, shared + ends[0])
    expect(page.locator("#tree-note")).to_have_text(f"{cached} tokens cached in chunks of 16.")
    assert len(boxes(page)) == 1
    warm(client, shared + ends[1])
    cached = client.get("/v1/cache/tree").json()["cached_tokens"]
    expect(page.locator("#tree [role=treeitem]")).to_have_count(3)
    trunk, *twigs = boxes(page)
    assert trunk.startswith("Tokens 0 to ")
    assert "2 continuations" in trunk
    assert sum(int(re.search(r"([\d,]+) tokens?,", each)[1].replace(",", "")) for each in (trunk, *twigs)) == cached
    complete(client, shared + ends[0])
    complete(client, "Something else altogether, which nobody has read before. " * 3)
    expect(page.locator("#rate")).to_have_text(re.compile(r"^\d+ %$"))
    expect(page.locator("#flow rect").first).to_be_attached()
    expect(page.locator("#ttft circle.device").first).to_be_attached()
    expect(page.locator("#ttft circle.computed").first).to_be_attached()
    expect(page.locator("#warm")).to_have_text(re.compile(r"ms|s$"))
    expect(page.locator("#reasons")).to_contain_text("found")
    assert [each.inner_text() for each in page.locator("#memory b").all()] == ["device", "disk"]


def test_what_the_cold_tier_has_is_told_apart(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    warm(client, SECRET)
    page = visit(server.url)
    expect(page.locator("#tree .stored")).to_have_count(1)
    expect(page.locator("#stored-key")).to_be_visible()
    assert boxes(page)[0].endswith("also in a tier below")


def test_what_was_evicted_is_drawn_below_until_it_is_asked_for_again_or_deleted(
    crowded: ServerProcess,
    visit: Visit,
    corpus: list[FactDocument],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    system = {"role": "system", "content": SYSTEM_PROMPT}
    with httpx.Client(base_url=crowded.url, trust_env=False, timeout=60) as client:

        def ask(document: FactDocument) -> None:
            messages = [system, {"role": "user", "content": document.facts[0].question}]
            body = {"messages": messages, "max_tokens": 2, "temperature": 0, "rag": {"k": 1}}
            client.post("/v1/chat/completions", json=body).raise_for_status()

        def tree() -> dict[str, Any]:
            return dict(client.get("/v1/cache/tree", params={"max_nodes": 600}).raise_for_status().json())

        add(client, corpus)
        page = visit(crowded.url)
        for document in corpus:
            ask(document)
        below = [node for node in tree()["nodes"] if node["tier"] == "below"]
        assert below
        expect(page.locator("#tree .below")).to_have_count(len(below))
        expect(page.locator("#below-key")).to_be_visible()
        total = sum(node["tokens"] for node in below)
        expect(page.locator("#tree-note")).to_contain_text(f"; {total:,} more were written to a tier below and left")
        labels = [
            each
            for each in boxes(page)
            if each.endswith("only in a tier below the device, which may have lost it since")
        ]
        assert len(labels) == len(below)
        monkeypatch.setenv("COLUMNS", "200")
        assert cli.main(["tree", "--max-nodes", "600", "--url", crowded.url]) == 0
        printed = capsys.readouterr().out
        assert f"; {total} more only in a tier below" in printed
        assert printed.count("which may have lost it since") == len(below)
        oldest = max(below, key=lambda node: node["idle_seconds"])["id"]
        expect(page.locator(f"#box-{oldest}")).to_have_class(re.compile("below"))
        ask(corpus[0])
        assert next(node for node in tree()["nodes"] if node["id"] == oldest)["tier"] == "device"
        expect(page.locator(f"#box-{oldest}")).to_have_class(re.compile("stored"))
        names = [each["id"] for each in client.get("/v1/documents").json()["data"]]
        client.delete("/v1/documents", params={"id": names}).raise_for_status()
        expect(page.locator("#tree .below")).to_have_count(0)
        expect(page.locator("#below-key")).not_to_be_visible()
        assert tree()["below_tokens"] == 0


def test_it_draws_while_a_request_holds_the_tree(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    page = visit(server.url)
    pin = client.post("/v1/cache/pin", json={"prompt": SECRET}).raise_for_status().json()
    expect(page.locator("#tree .held")).to_have_count(1)
    assert "held by 1 now" in boxes(page)[0]
    client.delete(f"/v1/cache/pin/{pin['id']}").raise_for_status()
    expect(page.locator("#tree .held")).to_have_count(0)


def test_a_tree_that_is_too_large_is_cut(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    shared = "A beginning that all of them have, sixteen tokens and more of it. "
    for number in range(90):
        warm(client, f"{shared}{'abcdefghij'[number % 10]}{number} has a way of its own to go on, as all others do.")
    page = visit(server.url)
    expect(page.locator("#tree .more")).not_to_have_count(0)
    assert page.locator("#tree [role=treeitem]").count() < 130
    assert any(each.endswith("not shown") for each in boxes(page))


def random_tree(rng: random.Random) -> dict[str, Any]:
    """A tree as the server tells it, parents before children."""
    nodes: list[dict[str, Any]] = []

    def grow(parent: str | None, start: int, depth: int) -> int:
        children = rng.randint(0 if depth else 1, 3) if depth < 4 else 0
        for _ in range(children):
            node = {"id": f"n{len(nodes)}", "parent": parent, "start": start, "tokens": 16 * rng.randint(1, 9)}
            nodes.append(node)
            node["hidden_children"] = rng.choice([0, 0, 0, 5])
            grow(node["id"], start + node["tokens"], depth + 1)
        return children

    grow(None, 0, 0)
    return {"nodes": nodes, "chunk_tokens": 16, "hidden_children": rng.choice([0, 3])}


def test_blocks_are_as_wide_as_their_tokens_and_as_high_as_what_hangs_on_them(
    visit: Visit, server: ServerProcess
) -> None:
    page, rng = visit(server.url), random.Random(5)
    lay_out = "([tree, root]) => import('/page/layout.js').then((m) => m.layOut(tree, root))"
    for _ in range(40):
        tree = random_tree(rng)
        root = rng.choice([None, None, rng.choice(tree["nodes"])["id"]])
        drawn = page.evaluate(lay_out, [tree, root])
        parts = {each["node"]["id"]: each for each in drawn["boxes"]}
        shown = [node for node in tree["nodes"] if root is None or node["id"] == root or is_below(tree, node, root)]
        assert {node["id"] for node in shown} == {name for name in parts if name.startswith("n")}
        assert sum(each["hidden"] for each in drawn["boxes"]) == sum(
            node["hidden_children"] for node in [*shown, *([tree] if root is None else [])]
        )
        for node in shown:
            part = parts[node["id"]]
            assert (part["x"], part["width"]) == (node["start"], node["tokens"])
            if node["id"] != root and node["parent"] is not None:
                parent = parts[node["parent"]]
                assert part["x"] == parent["x"] + parent["width"]
                assert parent["y"] <= part["y"] < part["y"] + part["height"] <= parent["y"] + parent["height"]
                assert part["level"] == parent["level"] + 1
        ends = [
            each
            for each in drawn["boxes"]
            if each["height"] == 1
            and not any(
                other is not each and other["x"] == each["x"] + each["width"] and other["y"] == each["y"]
                for other in drawn["boxes"]
            )
        ]
        assert sorted(each["y"] for each in ends) == list(range(drawn["rows"])), "one way to go on in each row"
        for row in range(drawn["rows"]):
            spans = sorted(
                (each["x"], each["x"] + each["width"])
                for each in drawn["boxes"]
                if each["y"] <= row < each["y"] + each["height"]
            )
            assert all(one[1] <= other[0] for one, other in pairwise(spans)), "two blocks lie on each other"


def is_below(tree: dict[str, Any], node: dict[str, Any], root: str | None) -> bool:
    parents = {each["id"]: each["parent"] for each in tree["nodes"]}
    at = node["parent"]
    while at is not None and at != root:
        at = parents[at]
    return at is not None


def test_the_tree_by_keyboard(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    shared = "You answer questions about the harbor, its cranes and its tower. " * 4
    for end in ("Who has the bell of the tower?", "Why is the bridge closed in winter, and for how long?"):
        warm(client, shared + end)
    page = visit(server.url)
    expect(page.locator("#tree [role=treeitem]")).to_have_count(3)
    trunk, upper, lower = (each.split(" · ")[0] for each in boxes(page))  # what follows is the time since its last use
    selected = page.locator("#selected")
    page.locator("#tree").focus()
    expect(selected).to_contain_text(trunk)
    for key, label in (
        ("ArrowRight", upper),
        ("ArrowDown", lower),
        ("ArrowUp", upper),
        ("ArrowLeft", trunk),
        ("End", lower),
        ("Home", trunk),
    ):
        page.keyboard.press(key)
        at = page.locator("#tree").get_attribute("aria-activedescendant")
        assert (page.locator(f"#{at}").get_attribute("aria-label") or "").startswith(f"{label} · "), key
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#tree [role=treeitem]")).to_have_count(1)
    expect(page.get_by_role("button", name="Whole tree")).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.locator("#tree [role=treeitem]")).to_have_count(3)


def test_everything_can_be_reached_by_tab(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    warm(client, SECRET)
    page = visit(server.url)
    expect(page.locator("#tree [role=treeitem]")).to_have_count(1)
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"pause", "text", "tree", "question", "explain", "Ask", "View", "More"} <= reached
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


def test_a_question_is_explained_and_answered(
    visit: Visit, server: ServerProcess, client: httpx.Client, corpus: list[FactDocument]
) -> None:
    add(client, corpus)
    page = visit(server.url)
    page.get_by_text("More", exact=True).click()
    page.get_by_label("System prompt").fill(SYSTEM_PROMPT)
    page.locator("#retrieve").check()
    fact = corpus[2].facts[0]
    page.locator("#question").fill(fact.question)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer-note")).to_have_text(re.compile(r"^\d+ of \d+ tokens were reused"))
    assert fact.value in page.locator("#answer").inner_text()
    before = page.locator("#verdict").inner_text()
    found, all_tokens = (int(each) for each in re.match(r"(\d+) of (\d+) tokens", before).groups())
    assert found < all_tokens
    assert page.locator("#used tbody tr").count() == 4
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#verdict")).not_to_have_text(before)
    expect(page.locator("#answer-note")).to_have_text(re.compile(r"reused"))
    again = int(re.match(r"(\d+)", page.locator("#verdict").inner_text())[1])
    assert again > 0.9 * all_tokens
    assert page.locator("#answer-note").inner_text().startswith(f"{again} of {all_tokens}")
    expect(page.locator("#used tbody")).to_contain_text("100 %")
    spans = page.locator("#range-table tbody td.span").all_inner_texts()
    assert spans[0].startswith("0 to ")
    assert spans[-1] == str(all_tokens - 1)
    expect(page.locator("#documents tbody tr")).to_have_count(4)
    expect(page.locator("#documents tbody tr").first).to_contain_text("%")


def test_only_explaining_sends_nothing(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    page = visit(server.url)
    page.get_by_text("More", exact=True).click()
    page.locator("#kind").select_option("completion")
    page.locator("#question").fill(SECRET)
    page.get_by_role("button", name="Only explain").click()
    expect(page.locator("#verdict")).to_have_text(re.compile(r"^0 of \d+ tokens \(0 %\)"))
    assert not page.locator("#answer-box").is_visible()
    assert client.get("/v1/cache/tree").json()["cached_tokens"] == 0
    warm(client, SECRET)
    page.get_by_role("button", name="Only explain").click()
    expect(page.locator("#range-table tbody tr").first).to_contain_text("reused")


def test_an_error_is_told_and_the_next_question_is_answered(
    visit: Visit, server: ServerProcess, client: httpx.Client
) -> None:
    page = visit(server.url, failing=("400",))
    page.locator("#question").fill("word " * 3000)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#verdict")).to_have_text(re.compile("tokens"))
    assert not page.locator("#answer-box").is_visible() or page.locator("#answer").inner_text() == ""
    page.locator("#question").fill("Who has the bell?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer-note")).to_have_text(re.compile("generated"))


def test_text_is_hidden_until_it_is_switched_on(
    visit: Visit, server: ServerProcess, client: httpx.Client, corpus: list[FactDocument]
) -> None:
    add(client, corpus)
    warm(client, SECRET)
    page = visit(server.url)
    page.locator("#retrieve").check()
    page.locator("#question").fill("Which code?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer-note")).to_have_text(re.compile("reused"))
    titles = [each.title for each in corpus]
    expect(page.locator("#documents tbody tr")).to_have_count(4)
    for box in page.locator("#tree [role=treeitem]").all():
        box.hover(force=True)
        assert "Zanzibar" not in page.content()
    assert not any(title in page.content() for title in titles)
    page.get_by_role("button", name="Show text").click()
    expect(page.locator("#range-table q").first).to_be_visible()
    expect(page.locator("#documents tbody th").filter(has_text=re.compile("|".join(titles)))).to_have_count(4)
    page.locator("#tree").focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    expect(page.locator("#selected q")).to_be_visible()
    page.get_by_role("button", name="Hide text").click()
    expect(page.locator("#selected q")).to_have_count(0)
    assert not any(title in page.content() for title in titles)


def test_markup_in_documents_and_prompts_is_text(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    nasty = "<img src=x onerror=alert(1)><b>bold</b>"
    client.post(
        "/v1/documents", json={"documents": [{"id": "nasty", "title": nasty, "text": f"The code is 7. {nasty}"}]}
    )
    page = visit(server.url)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.get_by_role("button", name="Show text").click()
    page.locator("#retrieve").check()
    page.locator("#question").fill(f"What is the code? {nasty}")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#documents tbody th")).to_contain_text("<img src=x")
    assert page.locator("main img").count() == 0
    assert page.locator("q b").count() == 0


def test_a_server_with_keys(visit: Visit, keyed: ServerProcess, api_key: str) -> None:
    page = visit(keyed.url, failing=("401", "403"))
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_visible()
    page.get_by_role("textbox", name="API key").fill("wrong-key-0123456789")
    page.get_by_role("button", name="Look in").click()
    expect(page.locator("#key-wrong")).to_be_visible()
    page.get_by_role("textbox", name="API key").fill(api_key)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("live")
    expect(dialog).not_to_be_visible()
    page.reload()
    expect(page.locator("#state")).to_have_text("live")
    assert not dialog.is_visible()
    # This server shows no cached text; the rest of the switch works.
    page.get_by_role("button", name="Show text").click()
    expect(page.locator("#text")).to_have_attribute("title", re.compile("--show-cache-text"))
    expect(page.locator("#state")).to_have_text("live")
    page.get_by_text("View", exact=True).click()
    page.get_by_role("button", name="Forget the API key").click()
    expect(dialog).to_be_visible()


def test_a_salt_has_a_tree_of_its_own(visit: Visit, server: ServerProcess, client: httpx.Client) -> None:
    cached = warm(client, SECRET, cache_salt="pepper")
    page = visit(server.url)
    expect(page.locator("#tree-empty")).to_be_visible()
    page.get_by_text("View", exact=True).click()
    page.get_by_label("Cache salt").fill("pepper")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("#tree-note")).to_contain_text(f"{cached} tokens")
    client.post("/v1/cache/clear", params={"cache_salt": "pepper"}).raise_for_status()


def test_nothing_is_asked_while_nobody_looks(visit: Visit, server: ServerProcess) -> None:
    page = visit(server.url)
    expect(page.locator("#state")).to_have_text("live")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#state")).to_have_text("paused")
    page.wait_for_timeout(300)  # one look may have been under way
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#state")).to_have_text("live")
    page.evaluate("""Object.defineProperty(document, 'hidden', {value: true, configurable: true});
        document.dispatchEvent(new Event('visibilitychange'))""")
    page.wait_for_timeout(300)
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    with page.expect_request("**/v1/cache/tree*"):
        pass


def test_a_server_in_trouble_that_comes_back_and_ends(visit: Visit) -> None:
    with ServerProcess(*SMALL) as process:
        process.wait_until_ready()
        page = visit(process.url, failing=("503", "ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE"))
        expect(page.locator("#state")).to_have_text("live")
        page.route("**/v1/cache/**", lambda route: route.fulfill(status=503, json={"error": {"message": "It ends."}}))
        expect(page.locator("#trouble")).to_have_text("It ends.")
        expect(page.locator("#state")).to_have_text("no answer")
        page.unroute("**/v1/cache/**")
        expect(page.locator("#state")).to_have_text("live")
        expect(page.locator("#trouble")).not_to_be_visible()
    expect(page.locator("#trouble")).to_have_text("The server does not answer. This page keeps trying.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (768, 1024), (1440, 900)])
def test_it_fits_every_screen(
    visit: Visit,
    server: ServerProcess,
    client: httpx.Client,
    corpus: list[FactDocument],
    scheme: str,
    width: int,
    height: int,
) -> None:
    add(client, corpus)
    warm(client, SECRET)
    # Without motion: a colour on its way to another has a contrast of its own.
    page = visit(server.url, width=width, height=height, color_scheme=scheme, reduced_motion="reduce")
    page.locator("#retrieve").check()
    page.locator("#question").fill("Which code?")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer-note")).to_have_text(re.compile("reused"))
    expect(page.locator("#documents tbody tr")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
    assert light == (scheme == "light")
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize(("scheme", "around"), [("light", 95), ("dark", 64)])
def test_a_block_is_readable_however_long_ago_it_was_used(
    visit: Visit, server: ServerProcess, client: httpx.Client, scheme: str, around: int
) -> None:
    """Its colour fades with the time, and its text turns from white to black on the way."""
    for i in range(24):
        warm(client, f"{i} blocks. " + SECRET)
    strengths = cycle(around + i / 2 for i in range(-12, 11))

    def fade(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        for node, strength in zip(body["nodes"], strengths, strict=False):
            node["idle_seconds"] = math.expm1((100 - min(strength, 100)) / 70 * math.log1p(3600))
        route.fulfill(response=answer, json=body)

    page = visit(server.url, color_scheme=scheme, reduced_motion="reduce")
    page.route("**/v1/cache/tree**", fade)
    page.reload()
    expect(page.locator("#tree .box text:not(:empty)").nth(12)).to_be_visible()
    assert page.locator("#tree .box[data-strong]").count() > 0 < page.locator("#tree .box:not([data-strong])").count()
    assert page.evaluate(CONTRAST) == []


# Text whose contrast with what is behind it is less than 4.5, WCAG 2.2's measure for text of any size.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = rgb(colour).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      if (at instanceof SVGGElement && at.classList.contains("box")) {
        const fill = getComputedStyle(at.firstElementChild).fill;
        if (fill !== "none") return fill;
      }
      const colour = getComputedStyle(at).backgroundColor;
      if (rgb(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.getClientRects().length) continue;
    if (node.closest("noscript, :disabled, option")) continue;
    const style = getComputedStyle(node);
    const [one, other] = [light(node instanceof SVGElement ? style.fill : style.color), light(behind(node))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) found.push(`${walker.currentNode.data.trim()}: ${contrast.toFixed(2)}`);
  }
  return found;
}"""
