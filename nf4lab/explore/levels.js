// Levels by NF4's recipe, and what they do to weights divided by the absmax of their block.
const { tails: TAILS, tail: NF4_TAIL, largest: LARGEST, block_size: BLOCK, families } = DATA;
const NAMES = Object.keys(families);
const FAMILIES = Object.fromEntries(NAMES.map((name) => [name,
  Object.fromEntries(Object.entries(families[name]).map(([key, text]) => [key, floats(text)]))]));

// The n quantiles of one side: row (tail, n) of a table of triangles.
function side(family, tail, n) {
  const start = tail * ((LARGEST * (LARGEST + 1)) / 2) + (n * (n - 1)) / 2;
  return [...FAMILIES[family].sides.subarray(start, start + n)];
}
function makeLevels(family, tail, n) {
  const up = side(family, tail, n >> 1), down = side(family, tail, (n - 1) >> 1), largest = up[0];
  return [...down.map((q) => -q), 0, ...up.reverse()].map((q) => Math.fround(q / largest));
}

// A symmetric function known at even steps of 0..1, by the cubic through four of them.
function at(table, s) {
  const n = table.length - 1, u = Math.min(Math.abs(s), 1) * n, i = clamp(Math.floor(u), 1, n - 2), t = u - i;
  const [a, b, c, d] = table.subarray(i - 1, i + 3);
  return b + t * ((c - a) / 2 + t * ((a + c) / 2 - b)) + ((t * (t * t - 1)) / 6) * (d - 3 * c + 3 * b - a);
}
function integrate(f, from, to, panels = 32) {  // Simpson's rule
  const h = (to - from) / (2 * panels);
  let sum = f(from) + f(to);
  for (let i = 1; i < 2 * panels; i++) sum += (i % 2 ? 4 : 2) * f(from + i * h);
  return (sum * h) / 3;
}
function measure(levels, weights) {
  const { share, power } = FAMILIES[weights];
  const edges = [-1, ...levels.slice(1).map((q, i) => (q + levels[i]) / 2), 1];
  // The largest of a block is stored at an end, without error: half of them at either.
  const ends = levels.map((_, i) => (i === 0 || i === levels.length - 1 ? 0.5 / BLOCK : 0));
  const usage = levels.map((_, i) => ends[i] + integrate((s) => at(share, s), edges[i], edges[i + 1]));
  const mse = levels.reduce((sum, q, i) =>
    sum + integrate((s) => at(power, s) * (s - q) ** 2, edges[i], edges[i + 1]), 0);
  const entropy = -usage.reduce((sum, p) => sum + (p > 0 ? p * Math.log2(p) : 0), 0);
  return { edges, usage, mse, entropy };
}

function parts(say) {
  const home = TAILS.indexOf(NF4_TAIL);
  let tail = home, family = "normal", weights = "normal", n = 2 * LARGEST, levels, found, reference;
  const field = {
    tail: slider({ label: "tail probability", min: 0, max: TAILS.length - 1, value: tail,
      text: (i) => `${TAILS[i].toFixed(i === home ? 7 : 4)}${i === home ? " (NF4)" : ""}`, change: (i) => { tail = i; update(); } }),
    n: slider({ label: "number of levels", min: 4, max: 2 * LARGEST, value: n, text: String, change: (v) => { n = v; update(); } }),
    family: choice({ label: "levels made for weights that are", options: NAMES.map((k) => [k, k]), value: family,
      change: (k) => { family = k; update(); } }),
    weights: choice({ label: "weights to quantize", options: NAMES.map((k) => [k, k]), value: weights,
      change: (k) => { weights = k; update(); } }),
  };
  const out = readouts({ mse: "mean squared error", entropy: "entropy of the codes", most: "most used code", least: "least used code" });
  const plot = chart("", (w) => (w < 480 ? 300 : 330), draw);
  const again = el("button", { type: "button", click: () => {
    [tail, family, weights, n] = [home, "normal", "normal", 2 * LARGEST];
    field.tail.set(tail); field.n.set(n); field.family.set(family); field.weights.set(weights);
    update();
  } }, "Back to NF4");

  function draw(w, h) {
    const left = 40, right = w - 10, base = h * 0.4, foot = h - 34, head = base + 46;
    const x = (s) => left + ((s + 1) / 2) * (right - left);
    const { share } = FAMILIES[weights], highest = Math.max(...share);
    const y = (s) => base - (at(share, s) / highest) * (base - 22);
    const curve = Array.from({ length: 161 }, (_, i) => -1 + i / 80).map((s) => `${x(s).toFixed(1)} ${y(s).toFixed(1)}`);
    const made = [svg("path", { d: `M${x(-1)} ${base}L${curve.join("L")}L${x(1)} ${base}z`, class: "bell" }),
      svg("text", { x: left, y: 12 }, "weights / absmax")];
    const slot = (right - left) / n, top = Math.max(2.2 / n, ...found.usage) * 1.02;
    const bar = (p) => foot - (p / top) * (foot - head);
    for (const edge of found.edges.slice(1, -1)) made.push(svg("line", { x1: x(edge), x2: x(edge), y1: base, y2: y(edge), class: "edge" }));
    levels.forEach((q, i) => {
      const centre = left + (i + 0.5) * slot;
      made.push(svg("path", { d: `M${x(q)} ${base + 1}V${base + 20}L${centre} ${head - 8}V${bar(found.usage[i])}`, class: "string" }));
      made.push(svg("line", { x1: x(q), x2: x(q), y1: base + 5, y2: Math.min(y(q), base - 8), class: "level" }));
      made.push(svg("rect", { x: centre - 0.39 * slot, width: 0.78 * slot, y: bar(found.usage[i]), height: foot - bar(found.usage[i]), class: "use" }));
      if (slot > 17 || i % 2 === (n - 1) % 2) made.push(svg("text", { x: centre, y: foot + 15, "text-anchor": "middle" }, String(i)));
    });
    // After the strings: the paper around each number covers them.
    for (const s of [-1, 0, 1]) made.push(svg("text", { x: x(s) - 5 * s, y: base + 16, "text-anchor": s < 0 ? "start" : s ? "end" : "middle", class: "scale" }, signed(String(s))));
    made.push(svg("line", { x1: left, x2: right, y1: base, y2: base, class: "axis" }), svg("line", { x1: left, x2: right, y1: foot, y2: foot, class: "axis" }));
    made.push(svg("line", { x1: left, x2: right, y1: bar(1 / n), y2: bar(1 / n), class: "even" }));
    made.push(svg("text", { x: left - 6, y: bar(1 / n) + 4, "text-anchor": "end" }, `1/${n}`));
    made.push(svg("text", { x: left - 6, y: foot + 15, "text-anchor": "end" }, "code"));
    return made;
  }

  function update(speak = true) {
    levels = makeLevels(family, tail, n);
    found = measure(levels, weights);
    reference = measure(makeLevels("normal", home, 16), weights);
    const order = found.usage.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0]);
    const [most, least] = [order[0], order[n - 1]], more = found.mse / reference.mse - 1;
    const compared = Math.abs(more) < 5e-4 ? "as NF4 on these weights" : `NF4 on these ${more > 0 ? "+" : ""}${percent(more)}`;
    out.set("mse", short(found.mse), compared, found.mse);
    out.set("entropy", `${fixed(found.entropy, 3)} bits`, `${fixed(Math.log2(n), 3)} if all were used alike`, found.entropy);
    out.set("most", percent(most[0], 2), `code ${most[1]}, level ${fixed(levels[most[1]], 3)}`, most[0]);
    out.set("least", percent(least[0], 2), `code ${least[1]}, level ${fixed(levels[least[1]], 3)}`, least[0]);
    plot.node.dataset.levels = levels.join(" ");
    plot.node.dataset.usage = found.usage.join(" ");
    plot.describe(`Above, the density of ${weights} weights divided by the absmax of their block of ${BLOCK}, with ${n} levels made ` +
      `for ${family} weights. Below, the share of the weights that each code takes, from ${percent(least[0], 2)} to ${percent(most[0], 2)}.`);
    plot.redraw();
    if (speak) say(`Error ${short(found.mse)}, ${compared}. Entropy ${fixed(found.entropy, 3)} of ${fixed(Math.log2(n), 3)} bits. ` +
      `Codes take between ${percent(least[0], 2)} and ${percent(most[0], 2)} of the weights.`);
  }

  update(false);
  return [el("div", { class: "controls" }, field.tail.node, field.n.node, field.family.node, field.weights.node),
    el("figure", {}, plot.node, el("figcaption", {},
      `Above: weights in blocks of ${BLOCK}, divided by absmax. Solid lines are the levels, dotted ones the boundaries ` +
      "between them. Below: how often each code is used; the dashed line is equal use. The shares are integrals, " +
      "exact to the digits shown, not a sample.")),
    out.node, el("div", { class: "row after" }, again)];
}

mount("levels", CSS, {
  title: "Equal use or least error?",
  question: "Drag the tail until the bars are as even as you can get them. Does the error fall with it?",
  look: "where the entropy is highest, the error is nearly twice NF4’s. Equal use and least error are two aims.",
  parts,
});
