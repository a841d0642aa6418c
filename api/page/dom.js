// Elements and numbers. Text goes in as text, never as markup: prompts and documents are anybody's.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

// Sets text only where it changes, so that a screen reader is not told the same thing every second.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });

export const count = (n) => whole.format(n);
export const compact = (n) => (n < 10000 ? whole.format(n) : short.format(n));
export const tokens = (n) => `${count(n)} ${n === 1 ? "token" : "tokens"}`;
export const percent = (part, all) => (all > 0 ? `${Math.round((100 * part) / all)} %` : "–");

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) [n, unit] = [n / 1024, unit + 1];
  return `${n >= 100 || unit === 0 ? Math.round(n) : n.toPrecision(3)} ${units[unit]}`;
}

export function seconds(s) {
  if (s < 0.0095) return `${(1000 * s).toFixed(1)} ms`;
  if (s < 0.9995) return `${Math.round(1000 * s)} ms`;
  return s < 100 ? `${s.toPrecision(3)} s` : `${Math.round(s)} s`;
}

export function ago(s) {
  if (s < 1) return "just now";
  if (s < 90) return `${Math.round(s)} s ago`;
  return s < 5400 ? `${Math.round(s / 60)} min ago` : `${Math.round(s / 3600)} h ago`;
}

// Round steps for an axis from 0 to `end`, at most `most` of them.
export function ticks(end, most) {
  const raw = end / Math.max(1, most);
  const power = 10 ** Math.floor(Math.log10(Math.max(1, raw)));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let at = 0; at <= end; at += step) found.push(at);
  return found;
}
