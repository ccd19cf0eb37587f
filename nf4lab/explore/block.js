// One block of 16 weights: absmax, codes, packed bytes and error, in the float32 arithmetic of nf4lab.
const { weights: START, levels: LEVELS, boundaries: BOUNDARIES, absmax_bytes: ABSMAX_BYTES } = DATA;
const f = Math.fround;
const BEND = 3, END = 30;  // the axis is linear to 3, logarithmic from there to 30
const OUTLIER = 12;

function quantize(weights) {
  const absmax = weights.reduce((largest, w) => Math.max(largest, Math.abs(w)), 0);
  const reciprocal = f(1 / absmax);
  const codes = weights.map((w) => {
    const s = absmax ? f(w * reciprocal) : 0;
    return BOUNDARIES.filter((boundary) => boundary < s).length;
  });
  const back = codes.map((code) => f(LEVELS[code] * absmax));
  const packed = codes.filter((_, i) => i % 2 === 0).map((code, i) => (code << 4) | codes[2 * i + 1]);
  const squares = weights.map((w, i) => (w - back[i]) ** 2);
  return { absmax, codes, back, packed, squares, mse: squares.reduce((a, b) => a + b) / weights.length };
}

// Where a weight stands, as a share of the plot's height from the top, and the way back.
const BAND = 0.16;
function toShare(w) {
  const size = Math.abs(w);
  const inner = 0.5 - BAND;
  const up = size <= BEND ? (size / BEND) * inner
    : inner + (Math.log(Math.min(size, END) / BEND) / Math.log(END / BEND)) * BAND;
  return 0.5 - Math.sign(w) * up;
}
function fromShare(share) {
  const up = Math.min(Math.abs(0.5 - share), 0.5), inner = 0.5 - BAND;
  const size = up <= inner ? (up / inner) * BEND : BEND * (END / BEND) ** ((up - inner) / BAND);
  return Math.sign(0.5 - share) * size;
}
// What the axis can tell apart: steps of 0.05, and of 0.5 in its outer bands.
function tidy(w) {
  const step = Math.abs(w) > BEND ? 0.5 : 0.05;
  return clamp(+(Math.round(w / step) * step).toFixed(2), -END, END);
}
const shown = (w) => fixed(w, Math.abs(w) >= 10 ? 1 : 2);

function parts(say) {
  let weights = START.map(f), chosen = 5, last;
  const columns = START.map((_, i) => column(i));
  const out = readouts({
    absmax: "absmax", zeros: "stored as zero", mse: "mean squared error", bits: "stored bytes",
  });
  const outlier = el("button", { class: "main", type: "button", click: makeOutlier });
  const again = el("button", { type: "button", click: () => { weights = START.map(f); update(); } }, "Start again");
  const detail = el("p", { class: "note" });

  function column(i) {
    const plot = svg("svg", { "aria-hidden": "true", preserveAspectRatio: "none" });
    const handle = el("div", {
      class: "handle", role: "slider", tabindex: 0, "aria-label": `weight ${i}`, "aria-orientation": "vertical",
      "aria-valuemin": -END, "aria-valuemax": END,
      keydown: (event) => press(event, i), focus: () => choose(i), pointerdown: (event) => grab(event, i),
    }, el("span", { class: "dot" }));
    // A mouse takes the weight from anywhere in its column. A finger drags by the handle, so that the page still scrolls
    // elsewhere, and taps where the weight shall go.
    const track = el("div", {
      class: "track", pointerdown: (event) => event.pointerType === "mouse" && grab(event, i), click: (event) => tap(event, i),
    }, plot, el("span", { class: "back" }), handle);
    const cells = { value: el("span", { class: "value" }), code: el("span", { class: "code", "data-code": i }) };
    return { node: el("div", { class: "column" }, cells.value, track, cells.code), handle, track, plot, ...cells };
  }

  function choose(i) {
    chosen = i;
    update(false);
  }

  function set(i, w) {
    weights[i] = f(tidy(w));
    chosen = i;
    update();
  }

  function makeOutlier() {
    const sign = weights[chosen] < 0 ? -1 : 1;
    set(chosen, Math.abs(weights[chosen]) >= OUTLIER ? START[chosen] : sign * OUTLIER);
  }

  function press(event, i) {
    const w = weights[i], away = Math.abs(w) > BEND + 0.01;
    const fine = away ? 0.5 : 0.05, coarse = away ? 3 : 0.5;
    const to = { ArrowUp: w + fine, ArrowRight: w + fine, ArrowDown: w - fine, ArrowLeft: w - fine,
      PageUp: w + coarse, PageDown: w - coarse, Home: -END, End: END }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    // From 3.00 a fine step outwards must reach the next value of the coarser band.
    set(i, Math.abs(Math.abs(w) - BEND) < 0.01 && Math.abs(to) > BEND + 0.01
      ? Math.sign(to) * Math.max(Math.abs(to), BEND + 0.5) : to);
  }

  function grab(event, i) {
    event.preventDefault();
    event.stopPropagation();
    const { track, handle } = columns[i], { pointerId } = event;
    handle.focus({ preventScroll: true });
    const box = track.getBoundingClientRect();
    const centre = box.top + toShare(weights[i]) * box.height;
    const slip = event.currentTarget === handle ? event.clientY - centre : 0;  // hold it where it was taken
    const move = (e) => {
      if (e.pointerId !== pointerId) return;
      const now = track.getBoundingClientRect();
      set(i, fromShare((e.clientY - slip - now.top) / now.height));
    };
    const stop = (e) => {
      if (e.pointerId !== pointerId) return;
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", stop);
      removeEventListener("pointercancel", stop);
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", stop);
    addEventListener("pointercancel", stop);
    if (!slip && event.currentTarget === track) move(event);
  }

  function tap(event, i) {
    const { track, handle } = columns[i];
    if (event.pointerType === "mouse" || handle.contains(event.target)) return;
    const box = track.getBoundingClientRect();
    set(i, fromShare((event.clientY - box.top) / box.height));
  }

  function lines(i) {
    const made = [];
    for (const level of LEVELS) {
      const y = 100 * toShare(level * last.absmax);
      made.push(svg("line", { x1: 0, x2: 100, y1: y, y2: y, class: level ? "level" : "level zero", "vector-effect": "non-scaling-stroke" }));
    }
    const [from, to] = [100 * toShare(weights[i]), 100 * toShare(last.back[i])];
    made.push(svg("line", { x1: 50, x2: 50, y1: from, y2: to, class: "miss", "vector-effect": "non-scaling-stroke" }));
    return [svg("rect", { x: 0, y: 0, width: 100, height: 100 * BAND, class: "beyond" }),
      svg("rect", { x: 0, y: 100 * (1 - BAND), width: 100, height: 100 * BAND, class: "beyond" }), ...made];
  }

  function update(speak = true) {
    last = quantize(weights);
    columns.forEach(({ node, handle, track, plot, value, code }, i) => {
      const w = weights[i], largest = last.absmax > 0 && Math.abs(w) === last.absmax;
      node.classList.toggle("chosen", i === chosen);
      node.classList.toggle("largest", largest);
      value.textContent = shown(w);
      code.textContent = last.codes[i];
      handle.style.top = `${100 * toShare(w)}%`;
      track.querySelector(".back").style.top = `${100 * toShare(last.back[i])}%`;
      handle.setAttribute("aria-valuenow", +w.toFixed(2));
      handle.setAttribute("aria-valuetext",
        `${shown(w)}, code ${last.codes[i]}, comes back as ${shown(last.back[i])}${largest ? ", the largest" : ""}`);
      plot.setAttribute("viewBox", "0 0 100 100");
      plot.replaceChildren(...lines(i));
    });
    const hex = last.packed.map((byte) => byte.toString(16).padStart(2, "0"));
    byteCells.forEach((cell, i) => { cell.textContent = hex[i]; });
    const zeros = last.codes.filter((code) => LEVELS[code] === 0).length;
    const total = hex.length + ABSMAX_BYTES;
    out.set("absmax", shown(last.absmax), `weight ${weights.findIndex((w) => Math.abs(w) === last.absmax)} is the largest`,
      last.absmax);
    out.set("zeros", `${zeros} of 16`, "code 7", zeros);
    out.set("mse", short(last.mse), `${short(Math.sqrt(last.mse))} is its root`, last.mse);
    out.set("bits", `${hex.length} + ${ABSMAX_BYTES}`, `${(8 * total) / 16} bits per weight`, total);
    const w = weights[chosen];
    const s = last.absmax ? f(w * f(1 / last.absmax)) : 0;
    detail.textContent = `Weight ${chosen}: ${shown(w)} / ${shown(last.absmax)} = ${fixed(s, 4)}, nearest level ` +
      `${fixed(LEVELS[last.codes[chosen]], 4)}, code ${last.codes[chosen]}, comes back as ${fixed(last.back[chosen], 3)}.`;
    outlier.textContent = Math.abs(w) >= OUTLIER ? `Calm weight ${chosen}` : `Make weight ${chosen} an outlier`;
    if (speak) say(`absmax ${shown(last.absmax)}. ${zeros} of 16 weights are stored as zero. ` +
      `Mean squared error ${short(last.mse)}.`);
  }

  const byteCells = START.filter((_, i) => i % 2 === 0).map((_, i) => el("span", { class: "byte", "data-byte": i }));
  const ticks = [10, BEND, 2, 1, 0, -1, -2, -BEND, -10];
  const board = el("div", { class: "board" });
  for (const half of [0, 1]) {
    const axis = el("div", { class: "ticks", "aria-hidden": "true" },
      ...ticks.map((t) => el("span", { style: `top:${100 * toShare(t)}%` }, signed(String(t)))));
    const rows = el("div", { class: "names", "aria-hidden": "true" },
      el("span", { class: "value" }, "weight"), el("div", { class: "track" }, axis), el("span", { class: "code" }, "code"),
      el("span", { class: "byte" }, "byte"));
    const grid = el("div", { class: "eight" }, ...columns.slice(8 * half, 8 * half + 8).map((c) => c.node),
      ...byteCells.slice(4 * half, 4 * half + 4));
    board.append(el("div", { class: "half" }, rows, grid));
  }
  const key = el("figcaption", {},
    ...[["dot", "weight, its value above"], ["back", "what comes back"], ["level", "levels × absmax"]].map(
      ([mark, text]) => el("span", { class: "entry" }, el("span", { class: `key ${mark}` }), `${text} `)),
    el("span", { class: "bands" }, "In the grey bands the axis goes on to ±30."));
  update(false);
  return [el("div", { class: "row" }, outlier, again), el("figure", {}, board, key), detail, out.node];
}

mount("block", CSS, {
  title: "One block, one absmax",
  question: "Sixteen weights share one absmax. Drag one of them far out, or make it an outlier. " +
    "How many of the other fifteen are still told apart from zero?",
  look: "the levels move apart with the largest weight, and the others fall onto fewer and fewer of them. " +
    "The bytes stay as many as they were.",
  parts,
});
