// The page's heart: asks the server once a second, while somebody looks.

import { AskBox } from "/page/ask.js";
import { Client } from "/page/client.js";
import { byId, say } from "/page/dom.js";
import { Flow, showDocuments, showMemory, showReasons, showTiles, showTimes } from "/page/figures.js";
import { TreeView } from "/page/tree.js";

const EVERY = 1000; // milliseconds
const SLOWEST = 10000; // between two tries when the server does not answer
const NODES = 600; // chunks of the tree at most

const client = new Client();
const view = new TreeView();
const flow = new Flow();
const box = new AskBox(client);

let timer = null;
let isPaused = false;
let isAsking = false;
let failures = 0;
let looks = 0;
let latest = null;

function schedule(after) {
  clearTimeout(timer);
  if (!isPaused && !document.hidden && !byId("key-dialog").open) timer = setTimeout(look, after);
}

async function look() {
  if (isAsking) return;
  isAsking = true;
  try {
    const text = byId("text").getAttribute("aria-pressed") === "true";
    const [stats, tree, requests, health] = await Promise.all([
      client.get("/v1/cache/stats"), lookAtTree(text), client.get("/v1/cache/requests", { limit: 200 }), client.get("/health"),
    ]);
    latest = { stats, requests: requests.data };
    box.hasTiers = Object.keys(stats.tiers).length > 1;
    flow.add(stats.tenant);
    view.show(tree);
    showTiles(stats, health, flow.recent);
    drawFigures();
    if (looks++ % 10 === 0 || failures) await introduce();
    failures = 0;
    tell(null);
  } catch (error) {
    failures += 1;
    if (error.status === 401) askForKey();
    else tell(error.status ? error.message : "The server does not answer. This page keeps trying.");
  } finally {
    isAsking = false;
    schedule(failures ? Math.min(SLOWEST, EVERY * 2 ** failures) : EVERY);
  }
}

// The tree with its text, if that is wanted and the server shows it.
async function lookAtTree(text) {
  try {
    return await client.get("/v1/cache/tree", { max_nodes: NODES, ...(text && { text: true }) });
  } catch (error) {
    if (!text || error.status !== 403) throw error;
    byId("text").title = "Titles and explanations are shown. Cached text is not: the server was started without --show-cache-text.";
    return client.get("/v1/cache/tree", { max_nodes: NODES });
  }
}

function drawFigures() {
  if (!latest) return;
  flow.draw();
  showReasons(latest.stats);
  showTimes(latest.requests, latest.stats.tenant);
  showMemory(latest.stats);
  showDocuments(latest.stats, box.showText);
}

// What changes seldom.
async function introduce() {
  const [models, version] = await Promise.all([client.get("/v1/models"), client.get("/version")]);
  say(byId("model"), models.data[0].id);
  say(byId("version"), `stemcache ${version.version}.`);
  document.title = `stemcache: ${models.data[0].id}`;
  const documents = await client.get("/v1/documents", { limit: 1 }).catch(() => ({ total: 0 }));
  box.offerDocuments(documents.total > 0);
}

function tell(trouble) {
  byId("trouble").hidden = !trouble;
  say(byId("trouble"), trouble ?? "");
  const state = trouble ? "trouble" : isPaused ? "paused" : "live";
  byId("state").dataset.state = state;
  say(byId("state"), state === "trouble" ? "no answer" : state);
}

function askForKey() {
  const dialog = byId("key-dialog");
  byId("key-wrong").hidden = !client.key;
  client.key = "";
  if (!dialog.open) dialog.showModal();
}

byId("key-form").addEventListener("submit", () => {
  client.key = byId("key").value.trim();
  byId("key").value = "";
  byId("forget").hidden = false;
  [failures, looks] = [0, 0];
});
byId("key-dialog").addEventListener("close", () => client.key ? schedule(0) : byId("key-dialog").showModal());
byId("forget").addEventListener("click", () => [(client.key = ""), location.reload()]);

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", isPaused);
  tell(null);
  schedule(0);
});

byId("text").addEventListener("click", () => {
  box.showText = byId("text").getAttribute("aria-pressed") !== "true";
  byId("text").setAttribute("aria-pressed", box.showText);
  say(byId("text"), box.showText ? "Hide text" : "Show text");
  box.redraw();
  schedule(0);
});

byId("salt").addEventListener("change", () => {
  client.salt = byId("salt").value;
  flow.clear();
  schedule(0);
});

for (const input of document.querySelectorAll("input[name=shade]")) {
  input.addEventListener("change", () => [(view.shade = input.value), view.draw()]);
}

document.addEventListener("visibilitychange", () => schedule(0));
new ResizeObserver(drawFigures).observe(document.querySelector("main"));
byId("forget").hidden = !client.key;
byId("use-documents").hidden = true;
look();
