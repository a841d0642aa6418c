// The tree's picture. Keeps its boxes between two answers, so that what grows is seen to grow.

import { ago, byId, count, el, say, svg, ticks, tokens } from "/page/dom.js";
import { layOut } from "/page/layout.js";

const AXIS = 22; // pixels above the boxes
const TALLEST = 30;
const FULL = 420; // what the picture fills, as long as rows are at least LOWEST high
const LOWEST = 5;
const HOUR = 3600;
const DARK = matchMedia("(prefers-color-scheme: dark)");
// Up to these strengths of its colour, in percent, a box's text is black on the light page and white on the dark one,
// above them the other way: either then has a contrast of 4.5 at least.
const LIGHT_TEXT = { device: 93, stored: 96 };
const DARK_TEXT = { device: 64, stored: 64 };

export class TreeView {
  shade = "recency";
  #svg = byId("tree");
  #tree = null;
  #root = null; // the id of the branch that is zoomed into
  #selected = null; // the id of the branch that the keys are at
  #boxes = new Map(); // id to group
  #placed = [];
  #axis = svg("g", { class: "axis", "aria-hidden": "true" });
  #layer = svg("g");

  constructor() {
    this.#svg.append(this.#axis, this.#layer);
    this.#svg.addEventListener("keydown", (event) => this.#key(event));
    this.#svg.addEventListener("focus", () => this.#select(this.#selected ?? this.#placed[0]?.node.id));
    byId("zoom-out").addEventListener("click", () => this.#zoom(null));
    DARK.addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.#svg.parentElement);
  }

  show(tree) {
    this.#tree = tree;
    if (!tree.nodes.some((node) => node.id === this.#root)) this.#root = null;
    this.draw();
  }

  draw() {
    if (!this.#tree) return;
    const { boxes, rows, start, stop } = layOut(this.#tree, this.#root);
    this.#placed = boxes;
    const width = this.#svg.parentElement.clientWidth;
    const high = Math.max(LOWEST, Math.min(TALLEST, FULL / Math.max(1, rows)));
    const scale = width / (stop - start);
    this.#svg.setAttribute("width", width);
    this.#svg.setAttribute("height", AXIS + rows * high + 1);
    this.#svg.toggleAttribute("hidden", boxes.length === 0);
    byId("tree-empty").hidden = boxes.length > 0;
    this.#drawAxis(start, stop, scale, width);
    const kept = new Set(boxes.map((box) => box.node.id));
    for (const [id, group] of this.#boxes) if (!kept.has(id)) [group.remove(), this.#boxes.delete(id)];
    for (const box of boxes) this.#drawBox(box, (box.x - start) * scale, AXIS + box.y * high, box.width * scale, high);
    if (!kept.has(this.#selected)) this.#select(null);
    else this.#describe();
    byId("zoom-out").disabled = this.#root === null;
    byId("stored-key").hidden = !boxes.some((box) => kind(box) === "stored");
    byId("below-key").hidden = !boxes.some((box) => kind(box) === "below");
    const { cached_tokens: all, shown_tokens: shown, below_tokens: below } = this.#tree;
    say(byId("tree-note"), `${tokens(all)} cached in chunks of ${this.#tree.chunk_tokens}` +
      `${shown < all ? `; the latest ${count(shown)} are shown` : ""}${below ? `; ${count(below)} more were written to a tier below and left the device` : ""}.`);
  }

  #drawAxis(start, stop, scale, width) {
    const steps = ticks(stop, Math.max(2, Math.floor(width / 110))).filter((at) => at >= start);
    this.#axis.replaceChildren(...steps.flatMap((at) => {
      const x = (at - start) * scale;
      const near = x > width - 50 ? "end" : x < 20 ? "start" : "middle";
      return [svg("line", { x1: x, x2: x, y1: 15, y2: AXIS }), svg("text", { x, y: 11, "text-anchor": near }, at === steps[0] ? tokens(at) : count(at))];
    }));
  }

  #drawBox(box, x, y, width, high) {
    const { node } = box;
    let group = this.#boxes.get(node.id);
    if (!group) {
      group = this.#makeBox(node.id);
      group.style.transform = `translate(${x}px, ${y}px)`; // before it is in the page: it fades in where it belongs
      this.#layer.append(group);
      this.#boxes.set(node.id, group);
    }
    const height = box.height * high;
    group.style.transform = `translate(${x}px, ${y}px)`;
    const [rect, held, label] = group.children;
    for (const each of [rect, held]) {
      each.style.width = `${Math.max(0.5, width - 1)}px`;
      each.style.height = `${Math.max(0.5, height - 1)}px`;
    }
    group.setAttribute("class", `box ${kind(box)}` +
      `${node.sharers ? " held" : ""}${node.id === this.#selected ? " at" : ""}`);
    const strength = Math.round(this.#strength(box));
    group.style.setProperty("--strength", `${strength}%`);
    const tone = group.matches(".stored, .below") ? "stored" : "device";
    group.toggleAttribute("data-strong", strength > (DARK.matches ? DARK_TEXT : LIGHT_TEXT)[tone]);
    group.setAttribute("aria-level", box.level);
    group.setAttribute("aria-label", describe(box, this.#tree));
    const text = box.hidden ? `+${count(box.hidden)}` : width > 120 ? tokens(node.tokens) : count(node.tokens);
    say(label, height > 13 && width > 12 + 7.2 * text.length ? text : "");
    label.setAttribute("x", 7);
    label.setAttribute("y", Math.min(height / 2, 15) + 4);
  }

  #makeBox(id) {
    const group = svg("g", { id: `box-${id}`, role: "treeitem" },
      svg("rect", { class: "fill", rx: 2.5 }), svg("rect", { class: "edge", rx: 2.5 }), svg("text", {}));
    group.addEventListener("pointerenter", () => this.#select(id));
    group.addEventListener("click", () => this.#zoom(id));
    return group;
  }

  // How strong a box's colour is, in percent.
  #strength({ node, hidden }) {
    if (hidden) return 22;
    const full = node.tier === "below" ? 0.3 : 1; // hollow: what is below has to be loaded first
    if (this.shade === "sharers") return full * (30 + 70 * Math.min(1, Math.log2(1 + node.sharers) / 4));
    return full * (100 - 70 * Math.min(1, Math.log1p(node.idle_seconds) / Math.log1p(HOUR)));
  }

  #zoom(id) {
    if (id !== null && !this.#tree.nodes.some((node) => node.id === id)) return;
    this.#root = id === this.#root ? null : id;
    this.draw();
  }

  #select(id) {
    for (const each of [this.#selected, id]) this.#boxes.get(each)?.classList.toggle("at", each === id);
    this.#selected = id ?? null;
    if (id) this.#svg.setAttribute("aria-activedescendant", `box-${id}`);
    else this.#svg.removeAttribute("aria-activedescendant");
    this.#describe();
  }

  #describe() {
    const box = this.#placed.find((each) => each.node.id === this.#selected);
    const out = byId("selected");
    const words = box ? describe(box, this.#tree) : this.#placed.length ? "Point at a block to see what it is." : "";
    const text = box?.node.text ?? "";
    if (out.dataset.said === words + text) return;
    out.dataset.said = words + text;
    out.classList.toggle("muted", !box);
    out.replaceChildren(el("span", {}, words), ...(text ? [el("q", {}, excerpt(text))] : []));
  }

  #key(event) {
    const target = this.#target(event.key);
    if (target === undefined) return;
    event.preventDefault();
    if (target) {
      this.#select(target);
      this.#boxes.get(target)?.scrollIntoView({ block: "nearest" });
    }
  }

  // The id to go to, null for a key that was used otherwise, undefined for one that is not ours.
  #target(key) {
    const boxes = this.#placed;
    const here = boxes.find((each) => each.node.id === this.#selected);
    if (key === "Enter" || key === " ") return here ? (this.#zoom(here.node.id), null) : null;
    if (key === "Escape") return this.#root === null ? undefined : (this.#zoom(null), null);
    if (key === "Home") return boxes[0]?.node.id ?? null;
    if (key === "End") return boxes.at(-1)?.node.id ?? null;
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(key)) return undefined;
    if (!here) return boxes[0]?.node.id ?? null;
    const inside = (one, other) => one.y >= other.y && one.y < other.y + other.height;
    if (key === "ArrowRight") return boxes.find((b) => b.level === here.level + 1 && inside(b, here))?.node.id ?? null;
    if (key === "ArrowLeft") return boxes.find((b) => b.level === here.level - 1 && inside(here, b))?.node.id ?? null;
    const same = boxes.filter((b) => b.level === here.level);
    return same[same.indexOf(here) + (key === "ArrowDown" ? 1 : -1)]?.node.id ?? null;
  }
}

// What a box stands for: the class that gives it its colour.
function kind({ node, hidden }) {
  if (hidden) return "more";
  if (node.tier === "below") return "below";
  return node.stored_tokens >= node.tokens ? "stored" : "device";
}

function describe({ node, hidden }, tree) {
  if (hidden) return `${count(hidden)} more ${hidden === 1 ? "continuation" : "continuations"} not shown`;
  const chunks = node.chunks === 1 ? "1 chunk" : `${count(node.chunks)} chunks`;
  const parts = [
    `Tokens ${count(node.start)} to ${count(node.start + node.tokens)}: ${tokens(node.tokens)}, ${chunks} of ${tree.chunk_tokens}`,
    node.sharers ? `held by ${count(node.sharers)} now` : `last used ${ago(node.idle_seconds)}`,
  ];
  if (node.children) parts.push(`${count(node.children)} ${node.children === 1 ? "continuation" : "continuations"}`);
  if (node.tier === "below") parts.push("only in a tier below the device, which may have lost it since");
  else if (node.stored_tokens) {
    parts.push(node.stored_tokens < node.tokens ? `${tokens(node.stored_tokens)} also in a tier below` : "also in a tier below");
  }
  return parts.join(" · ");
}

const excerpt = (text) => (text.length > 600 ? `${text.slice(0, 300)} … ${text.slice(-300)}` : text);
