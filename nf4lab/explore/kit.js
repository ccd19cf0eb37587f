// What every explorable shares: elements, controls, readouts, a live region, the theme. No globals, no network.
const MINUS = "\u2212";

function build(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const signed = (text) => text.replace("-", MINUS);
const fixed = (x, digits) => signed(Math.abs(x) < 0.5 * 10 ** -digits ? (0).toFixed(digits) : x.toFixed(digits));
const percent = (share, digits = 1) => `${fixed(100 * share, digits)}%`;
// Small numbers keep three significant digits without an exponent.
const short = (x) => (x === 0 ? "0" : fixed(x, clamp(2 - Math.floor(Math.log10(Math.abs(x))), 0, 7)));
// float32 values travel as base64 of their bytes: exact, and shorter than decimals.
const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

function slider({ label, min, max, step = 1, value, text, spoken = text, change }) {
  const output = el("span", { class: "set", "aria-hidden": "true" });  // the input itself says it
  const input = el("input", { type: "range", min, max, step, value, "aria-label": label });
  const show = () => {
    output.textContent = text(+input.value);
    input.setAttribute("aria-valuetext", spoken(+input.value));
    input.style.setProperty("--fill", `${(100 * (input.value - min)) / (max - min)}%`);
  };
  input.addEventListener("input", () => { show(); change(+input.value); });
  const node = el("div", { class: "field" }, el("div", { class: "head" }, el("span", {}, label), output), input);
  const field = { node, input, show, set(v) { input.value = v; show(); } };
  show();
  return field;
}

let groups = 0;
function choice({ label, options, value, change }) {
  const name = `g${++groups}-${Math.random().toString(36).slice(2)}`;
  const node = el("fieldset", { class: "field" }, el("legend", {}, label));
  const pills = el("div", { class: "choices" });
  for (const [key, text] of options) {
    const input = el("input", { type: "radio", name, value: key, checked: key === value, change: () => change(key) });
    pills.append(el("label", { class: "choice" }, input, el("span", {}, text)));
  }
  node.append(pills);
  return { node, set(key) { for (const input of pills.querySelectorAll("input")) input.checked = input.value === key; } };
}

// A readout shows a rounded number and keeps the exact one in data-value, where the tests read it.
function readouts(entries) {
  const node = el("dl", { class: "readouts" });
  const parts = {};
  for (const [key, label] of Object.entries(entries)) {
    parts[key] = el("dd", { "data-out": key });
    node.append(el("div", {}, el("dt", {}, label), parts[key]));
  }
  return {
    node,
    set(key, text, small = "", value = text) {
      parts[key].replaceChildren(text, ...(small ? [el("small", {}, small)] : []));
      parts[key].setAttribute("data-value", value);
    },
  };
}

// An SVG that is drawn for the width it has, so that its text keeps its size, and again when the width changes.
function chart(label, height, draw) {
  const node = svg("svg", { role: "img", "aria-label": label });
  let width = 0;
  const redraw = () => {
    if (!width) return;
    const h = typeof height === "function" ? height(width) : height;
    node.setAttribute("height", h);
    node.setAttribute("viewBox", `0 0 ${width} ${h}`);
    node.replaceChildren(...draw(width, h));
  };
  new ResizeObserver(([entry]) => {
    const now = Math.floor(entry.contentRect.width);
    if (now && now !== width) { width = now; redraw(); }
  }).observe(node);
  return { node, redraw, describe: (text) => node.setAttribute("aria-label", text) };
}

const SHAPES = {
  o: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  s: (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  "^": (r) => `M0 ${-1.2 * r}L${1.15 * r} ${0.9 * r}H${-1.15 * r}z`,
  v: (r) => `M0 ${1.2 * r}L${1.15 * r} ${-0.9 * r}H${-1.15 * r}z`,
  "<": (r) => `M${-1.2 * r} 0L${0.9 * r} ${1.15 * r}V${-1.15 * r}z`,
  ">": (r) => `M${1.2 * r} 0L${-0.9 * r} ${1.15 * r}V${-1.15 * r}z`,
  P: (r) => `M${-0.4 * r} ${-1.2 * r}h${0.8 * r}v${0.8 * r}h${0.8 * r}v${0.8 * r}h${-0.8 * r}v${0.8 * r}h${-0.8 * r}v${-0.8 * r}h${-0.8 * r}v${-0.8 * r}h${0.8 * r}z`,
  D: (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0z`,
};
const mark = (shape, x, y, r, attributes = {}) =>
  svg("path", { d: (SHAPES[shape] || SHAPES.o)(r), transform: `translate(${x} ${y})`, ...attributes });

// The page says which theme it has: the book, Colab, JupyterLab and VS Code each in its own way; else the system does.
function isDark() {
  const { documentElement: root, body } = document;
  const named = root.dataset.theme || root.getAttribute("theme");
  if (named) return named.includes("dark");
  if (body.dataset.jpThemeLight) return body.dataset.jpThemeLight === "false";
  if (/vscode-(dark|light)/.test(body.className)) return body.className.includes("vscode-dark");
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

function followTheme(card) {
  const apply = () => card.classList.toggle("dark", isDark());
  const observer = new MutationObserver(apply);
  for (const node of [document.documentElement, document.body]) observer.observe(node, { attributes: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", apply);
  apply();
}

const stillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

// Fill every place of this name that waits: { title, question, look, parts(say) } makes the card.
function mount(name, css, { title, question, look, parts }) {
  for (const host of document.querySelectorAll(`[data-explorable="${name}"]:not([data-ready])`)) {
    host.dataset.ready = "";
    const live = el("p", { class: "sr", role: "status" });
    let timer = 0;
    const say = (text) => {  // once the reader rests, not at every step
      clearTimeout(timer);
      timer = setTimeout(() => { live.textContent = text; }, 500);
    };
    const card = el("section", { class: "card", "aria-labelledby": "title" },
      el("p", { class: "eyebrow" }, "Try it"), el("h3", { id: "title" }, title),
      el("p", { class: "question" }, question), ...parts(say),
      el("details", { class: "look", ...(matchMedia("print").matches && { open: "" }) },  // it gives the answer away
        el("summary", {}, "What to look for"), el("p", {}, look)), live);
    // Arrow keys belong to the control that has the focus; the page would turn over.
    card.addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); });
    const root = host.attachShadow({ mode: "open" });
    root.append(el("style", {}, css), card);
    followTheme(card);
  }
}
