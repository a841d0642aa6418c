// The figures around the tree: hit rate, times, memory by tier, documents.

import { byId, bytes, compact, count, el, percent, say, seconds, svg, tokens } from "/page/dom.js";

const KEPT = 120; // answers: two minutes of them
const DOCUMENTS = 12; // rows

const MISSES = [
  ["new", "computed", "new here", "Not cached after what stood before them, as far as the server remembers."],
  ["evicted", "evicted", "evicted before", "Were cached at this place and had to make room: a larger pool or a pin would keep them."],
  ["unfinished_chunk", "rest", "less than a chunk", "What is left over at a prompt's end is never cached alone."],
];

// Parts of one bar, as [class, value, label].
function bar(parts, all) {
  const shown = parts.filter(([, value]) => value > 0);
  const made = el("div", { class: "bar", "aria-hidden": "true" });
  for (const [kind, value] of shown) {
    const piece = el("span", { class: kind });
    piece.style.width = `${(100 * value) / all}%`;
    made.append(piece);
  }
  return made;
}

export class Flow {
  #latest = [];
  #before = null;

  // Takes an answer of /v1/cache/stats.
  add(tenant) {
    const now = { hits: tenant.hit_tokens, misses: tenant.miss_tokens };
    const before = this.#before;
    this.#before = now;
    if (!before || now.hits < before.hits || now.misses < before.misses) return; // the first, or a server that began anew
    this.#latest.push({ hits: now.hits - before.hits, misses: now.misses - before.misses });
    if (this.#latest.length > KEPT) this.#latest.shift();
  }

  clear() {
    this.#latest = [];
    this.#before = null;
  }

  get recent() {
    const sum = (name) => this.#latest.reduce((total, each) => total + each[name], 0);
    return { hits: sum("hits"), misses: sum("misses") };
  }

  draw() {
    const picture = byId("flow");
    const [width, height] = [picture.clientWidth || 400, 88];
    const most = Math.max(1, ...this.#latest.map((each) => each.hits + each.misses));
    const step = width / KEPT;
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("height", height);
    const bars = this.#latest.flatMap(({ hits, misses }, at) => {
      const x = width - (this.#latest.length - at) * step;
      const [found, computed] = [hits, misses].map((n) => ((height - 16) * n) / most);
      const piece = (kind, y, h) => h > 0 && svg("rect", { class: kind, x, y, width: Math.max(1, step - 1), height: h });
      return [piece("device", height - found, found), piece("computed", height - found - computed, computed)].filter(Boolean);
    });
    const top = most > 1 ? `two minutes; the highest bar is ${compact(most)} tokens` : "no prompts in the last two minutes";
    picture.replaceChildren(svg("line", { x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5, class: "base" }), ...bars,
      svg("text", { x: 0, y: 10 }, top));
  }
}

export function showTiles({ tenant }, health, recent) {
  const { hit_tokens: hits, miss_tokens: misses } = tenant;
  const lately = recent.hits + recent.misses > 0;
  say(byId("rate"), lately ? percent(recent.hits, recent.hits + recent.misses) : percent(hits, hits + misses));
  say(byId("rate-note"), hits + misses === 0 ? "no prompts yet"
    : lately ? `of prompt tokens in two minutes; ${percent(hits, hits + misses)} since the start` : "of prompt tokens since the start");
  const { cached, computed } = tenant.first_token;
  say(byId("warm"), cached.median_seconds === null ? "–" : seconds(cached.median_seconds));
  const both = cached.median_seconds !== null && computed.median_seconds !== null;
  const times = computed.median_seconds / cached.median_seconds;
  say(byId("warm-note"), both
    ? `${seconds(computed.median_seconds)} where most is computed${times > 1.05 ? `: ${times.toFixed(1)} times as long` : ""}`
    : cached.median_seconds === null ? "no cached request yet" : "median of the latest requests");
  say(byId("saved"), compact(hits));
  say(byId("saved-note"), `of ${compact(hits + misses)} prompt tokens were not computed again`);
  say(byId("working"), count(health.running));
  say(byId("working-note"), `${health.running === 1 ? "sequence runs" : "sequences run"}, ${count(health.waiting)} wait`);
}

export function showReasons({ tenant }) {
  const all = tenant.hit_tokens + tenant.miss_tokens;
  say(byId("tokens-note"), `${count(tenant.prompts)} prompts, ${tokens(all)} looked up since the server began.`);
  const parts = [["device", tenant.hit_tokens, "found", "Not computed: their keys and values were cached."],
    ...MISSES.map(([name, kind, label, why]) => [kind, tenant.misses[name], label, why])];
  const rows = parts.map(([kind, value, label, why]) => el("li", { title: why },
    el("span", { class: `swatch ${kind}` }), el("span", {}, label),
    el("b", {}, compact(value)), el("span", { class: "muted" }, percent(value, all))));
  byId("reasons").replaceChildren(...(all ? [bar(parts, all)] : []), el("ul", { class: "legend figures" }, ...rows));
}

// Two strips on one logarithmic axis; each request a dot, the median a line.
export function showTimes(requests, { first_token: medians }) {
  const picture = byId("ttft");
  const [width, height, left] = [picture.clientWidth || 400, 132, 74];
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.setAttribute("height", height);
  const times = requests.map((each) => each.first_token_seconds);
  const low = 10 ** Math.floor(Math.log10(Math.min(0.01, ...times)));
  const high = 10 ** Math.ceil(Math.log10(Math.max(0.1, ...times)));
  const x = (s) => left + ((width - left - 14) * Math.log(s / low)) / Math.log(high / low);
  const marks = [];
  for (let at = low; at <= high * 1.01; at *= 10) {
    marks.push(svg("line", { x1: x(at), x2: x(at), y1: 8, y2: height - 20, class: "grid" }),
      svg("text", { x: x(at), y: height - 5, "text-anchor": at * 1.01 > high ? "end" : "middle" },
        at < 0.9 ? `${Math.round(at * 1e4) / 10} ms` : `${Math.round(at)} s`));
  }
  const strip = (name, kind, middle) => {
    const own = requests.filter((each) => (2 * each.cached_tokens > each.prompt_tokens) === (name === "cached"));
    const median = medians[name].median_seconds;
    return [
      svg("text", { x: 0, y: middle + 4, class: "name" }, name),
      ...own.map((each) => svg("circle", {
        class: kind, cx: x(each.first_token_seconds), cy: middle + (((each.number * 7) % 9) - 4) * 2.6, r: 3.2,
      })),
      ...(median === null ? [svg("text", { x: left, y: middle + 4 }, "none yet")] : [
        svg("line", { class: "median", x1: x(median), x2: x(median), y1: middle - 20, y2: middle + 20 }),
        svg("text", { class: "value", x: Math.min(width - 44, x(median) + 6), y: middle - 13 }, seconds(median)),
      ]),
    ];
  };
  picture.replaceChildren(...marks, ...strip("cached", "device", 32), ...strip("computed", "computed", 86));
  const said = ["cached", "computed"].map((name) => {
    const { requests: n, median_seconds: median } = medians[name];
    return `${name}: ${n} requests${median === null ? "" : `, median ${seconds(median)}`}`;
  });
  picture.setAttribute("aria-label", `Time to the first token. ${said.join("; ")}.`);
}

export function showMemory({ tiers, tenant }) {
  const rows = Object.entries(tiers).map(([name, tier]) => {
    const { total, cached } = tier.bytes;
    const kind = name === "device" ? "device" : "stored";
    const own = name === "device" ? [["device", tenant.tiers.device.bytes.cached], ["others", cached - tenant.tiers.device.bytes.cached],
      ["private", (total / tier.chunks.total) * tier.chunks.private]] : [[kind, cached ?? 0]];
    const size = cached === null ? "what it holds, the tier does not tell" : total ? `${bytes(cached)} of ${bytes(total)}` : bytes(cached);
    return el("li", {},
      el("div", { class: "line" }, el("b", {}, name), el("span", {}, size)),
      total ? bar(own, total) : null,
      el("p", { class: "muted small" }, name === "device" ? deviceNote(tier, tenant) : tierNote(tier)),
      tier.trouble ? el("p", { class: "wrong small" }, tier.trouble) : null);
  });
  byId("memory").replaceChildren(el("ul", { class: "tiers" }, ...rows));
}

function deviceNote({ chunks }, { hit_tokens: hits, miss_tokens: misses }) {
  const held = chunks.leased ? `; ${count(chunks.leased)} cannot be evicted now` : "";
  const rate = hits + misses ? `${percent(hits, hits + misses)} of your prompt tokens were here when they were wanted; ` : "";
  return `${rate}${count(chunks.cached)} chunks cached, ${count(chunks.private)} of running requests, ${count(chunks.free)} free${held}`;
}

function tierNote(tier) {
  if (!tier.available) return "not available: what would be there is computed";
  const missed = Object.values(tier.misses).reduce((total, n) => total + n, 0);
  const why = Object.entries(tier.misses).filter(([, n]) => n).map(([reason, n]) => `${count(n)} ${reason.replaceAll("_", " ")}`);
  const rate = tier.hits + missed ? `${percent(tier.hits, tier.hits + missed)} of ${count(tier.hits + missed)} objects found` : "nothing looked up yet";
  return `${rate}${why.length ? ` (missed: ${why.join(", ")})` : ""}; ${tokens(tier.restored_tokens)} loaded instead of computed`;
}

export function showDocuments({ tenant }, withTitles) {
  const all = tenant.documents;
  const rows = all.slice(0, DOCUMENTS).map((each) => {
    const reused = each.hit_tokens + each.moved_tokens;
    const asked = reused + each.miss_tokens;
    const parts = [["device", each.hit_tokens], ["elsewhere", each.moved_tokens], ...MISSES.map(([name, kind]) => [kind, each.misses[name]])];
    return el("tr", {},
      el("th", { scope: "row" }, withTitles && each.title ? each.title : each.id, el("span", { class: "muted small" }, tokens(each.tokens))),
      el("td", { class: "num" }, count(each.requests)),
      el("td", { class: "reuse" }, bar(parts, asked), el("span", { class: "num" }, percent(reused, asked))),
      el("td", { class: "num" }, bytes(each.tiers.device.bytes.cached)));
  });
  byId("documents").hidden = rows.length === 0;
  byId("documents").tBodies[0].replaceChildren(...rows);
  say(byId("documents-note"), all.length === 0 ? "None was in a prompt yet: see docs/documents.md."
    : all.length > DOCUMENTS ? `The latest used ${DOCUMENTS} of ${count(all.length)}.` : "The latest used first.");
}
