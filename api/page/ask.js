// The box to ask a question: explains the prompt first, then sends it.

import { byId, count, el, percent, say, seconds, tokens } from "/page/dom.js";

const KIND = { // a range's colour, by its reason
  hit: "device", partial_chunk: "device", public: "stored", pending: "pending", evicted: "evicted", other_position: "elsewhere",
  other_namespace: "elsewhere", never_seen: "computed", unfinished_chunk: "rest", last_token: "rest",
};

export class AskBox {
  showText = false;
  hasTiers = false; // below the device, which an explanation does not look into
  #client;
  #busy = false;
  #report = null;

  constructor(client) {
    this.#client = client;
    byId("ask").addEventListener("submit", (event) => [event.preventDefault(), this.#run(true)]);
    byId("explain").addEventListener("click", () => byId("ask").reportValidity() && this.#run(false));
    byId("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) [event.preventDefault(), byId("ask").requestSubmit()];
    });
  }

  // Whether there are documents to retrieve.
  offerDocuments(offered) {
    byId("use-documents").hidden = !offered;
    if (!offered) byId("retrieve").checked = false;
  }

  redraw() {
    if (this.#report) this.#tell(this.#report);
  }

  #body() {
    const question = byId("question").value.trim();
    const room = { max_tokens: Math.max(1, Number(byId("length").value) || 64), temperature: 0 };
    if (byId("kind").value === "completion") return ["/v1/completions", { prompt: question, ...room }];
    const system = byId("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: question }];
    const rag = byId("retrieve").checked ? { rag: { k: Number(byId("k").value), order: byId("order").value, explain: true } } : {};
    return ["/v1/chat/completions", { messages, ...room, ...rag }];
  }

  async #run(alsoAsk) {
    if (this.#busy || !byId("question").value.trim()) return;
    this.#setBusy(true);
    byId("answer-box").hidden = true;
    const [path, body] = this.#body();
    try {
      this.#report = await this.#client.post("/v1/cache/explain", body);
      this.#tell(this.#report);
      if (alsoAsk) await this.#ask(path, body);
    } catch (error) {
      byId("told").hidden = false;
      say(byId("verdict"), error.message);
    } finally {
      this.#setBusy(false);
    }
  }

  #setBusy(busy) {
    this.#busy = busy;
    for (const id of ["ask", "told"]) byId(id).setAttribute("aria-busy", busy);
    for (const button of byId("ask").querySelectorAll("button")) button.disabled = busy;
  }

  #tell(report) {
    const { prompt_tokens: all, cached_tokens: found, ranges } = report;
    byId("told").hidden = false;
    say(byId("verdict"), `${count(found)} of ${tokens(all)} (${percent(found, all)}) are cached at this moment; ${count(all - found)} ` +
      (this.hasTiers && ranges.some((each) => ["never_seen", "evicted"].includes(each.reason)) ? "have to be computed, unless a tier below the device still has them." : "have to be computed."));
    byId("ranges").replaceChildren(...ranges.map((each) => {
      const piece = el("span", { class: KIND[each.reason] ?? "rest", title: `${each.start} to ${each.stop}: ${each.why}` });
      piece.style.flexGrow = each.tokens;
      return piece;
    }));
    byId("range-table").tBodies[0].replaceChildren(...ranges.map((each) => el("tr", {},
      el("td", { class: "span" }, each.tokens === 1 ? count(each.start) : `${count(each.start)} to ${count(each.stop - 1)}`),
      el("td", {}, el("span", { class: `swatch ${KIND[each.reason] ?? "rest"}` }), each.result === "hit" ? "reused" : "computed"),
      el("td", {}, each.why, this.showText ? el("q", {}, each.text) : null))));
    // Advice may quote the prompt.
    const advice = this.showText || !report.divergence ? report.advice
      : [`The prompt leaves the nearest cached path at token ${count(report.divergence.token)}; the words are hidden.`];
    byId("advice").replaceChildren(...advice.map((sentence) => el("li", {}, sentence)));
  }

  async #ask(path, body) {
    const begun = performance.now();
    let [first, usage, text, rag] = [null, null, "", null];
    byId("answer-box").hidden = false;
    byId("used").hidden = true;
    for (const id of ["answer", "answer-note"]) say(byId(id), "");
    await this.#client.stream(path, { ...body, stream_options: { include_usage: true } }, (event) => {
      rag ??= event.rag;
      usage = event.usage ?? usage;
      const piece = event.choices[0]?.delta?.content ?? event.choices[0]?.text ?? "";
      if (!piece) return;
      first ??= (performance.now() - begun) / 1000;
      say(byId("answer"), (text += piece));
    });
    if (!text) say(byId("answer"), "The model said nothing.");
    const found = usage.prompt_tokens_details.cached_tokens;
    say(byId("answer-note"), `${count(found)} of ${tokens(usage.prompt_tokens)} were reused, ${count(usage.prompt_tokens - found)} computed; ` +
      `${first === null ? "" : `the first text came after ${seconds(first)}, `}${tokens(usage.completion_tokens)} were generated.`);
    if (rag) this.#tellDocuments(rag);
  }

  #tellDocuments({ documents }) {
    byId("used").hidden = documents.length === 0;
    byId("used").tBodies[0].replaceChildren(...documents.map((each) => el("tr", {},
      el("th", { scope: "row" }, (this.showText && each.title) || each.id || "given by hand"),
      el("td", { class: "num" }, count(each.tokens)),
      el("td", { class: "num" }, percent(each.cached_tokens + each.moved_tokens, each.tokens)),
      el("td", {}, each.why ?? "all of it was reused"))));
  }
}
