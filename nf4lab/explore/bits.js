// Bits per weight: what a block's constants cost, and what the bits buy.
const { sizes: SIZES, schemes: SCHEMES, code_bits: CODE_BITS, budget: BUDGET } = DATA;
const MODELS = [7, 70];

const cost = (scheme, size) => ({
  codes: CODE_BITS,
  constants: scheme.bits / size,
  groups: scheme.group ? 32 / (size * scheme.group) : 0,
});
const total = (scheme, size) => Object.values(cost(scheme, size)).reduce((a, b) => a + b);
const gigabytes = (billions, bits) => (billions * bits) / 8;

function parts(say) {
  let at = SIZES.indexOf(64), scheme = SCHEMES[0];
  const size = slider({
    label: "block size", min: 0, max: SIZES.length - 1, value: at,
    text: (i) => `${SIZES[i].toLocaleString("en")} weights`, change: (i) => { at = i; update(); },
  });
  const plain = SCHEMES.filter((s) => !s.group), nested = SCHEMES.filter((s) => s.group);
  const pick = (list) => (key) => { scheme = list.find((s) => s.name === key); update(); };
  const width = choice({
    label: "bits of each block’s absmax", options: plain.map((s) => [s.name, s.label]), value: scheme.name,
    change: pick(plain),
  });
  const twice = choice({
    label: "double quantization, in groups of 256", value: "off", options: [["off", "off"], ...nested.map((s) => [s.name, s.label])],
    change: (key) => {
      if (key !== "off") return pick(nested)(key);
      scheme = plain.find((s) => s.name === width.node.querySelector(":checked").value);
      return update();
    },
  });
  const out = readouts({ bits: "bits per weight", small: "7 B model", large: "70 B model", error: "error on normal weights" });
  const bar = el("div", { class: "bar", "aria-hidden": "true" });
  const legend = el("p", { class: "legend" });
  const plot = chart("", (w) => (w < 480 ? 242 : 272), draw);

  function draw(w, h) {
    const box = { left: 46, right: w - 14, top: 26, bottom: h - 38 };
    // The axis is logarithmic in what the constants take: the settings crowd next to 4 bits.
    const extra = SCHEMES.flatMap((c) => SIZES.map((n) => total(c, n) - CODE_BITS));
    const [lo, hi] = [Math.log(Math.min(...extra) / 1.3), Math.log(Math.max(...extra) * 1.2)];
    const x = (b) => box.left + ((Math.log(b - CODE_BITS) - lo) / (hi - lo)) * (box.right - box.left);
    const errors = SCHEMES.flatMap((c) => c.mse), top = Math.max(...errors) * 1.04, bottom = Math.min(...errors) * 0.9;
    const y = (e) => box.bottom - ((e - bottom) / (top - bottom)) * (box.bottom - box.top);
    const made = [svg("rect", { x: box.left, y: box.top, width: x(BUDGET) - box.left, height: box.bottom - box.top, class: "fits" })];
    for (const b of w < 480 ? [4.002, 4.02, 4.125, 4.5, 6] : [4.002, 4.008, 4.03, 4.125, 4.5, 5, 6]) {
      made.push(svg("text", { x: x(b), y: box.bottom + 16, "text-anchor": "middle" }, String(b)));
      made.push(svg("line", { x1: x(b), x2: x(b), y1: box.top, y2: box.bottom, class: "grid" }));
    }
    for (let tick = 0.006; tick < top; tick += 0.002) {
      if (tick < bottom) continue;
      made.push(svg("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toFixed(3)));
      made.push(svg("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick), class: "grid" }));
    }
    made.push(svg("text", { x: 0, y: 12 }, "mean squared error"));
    made.push(svg("line", { x1: x(BUDGET), x2: x(BUDGET), y1: box.top, y2: box.bottom, class: "budget" }));
    made.push(svg("text", { x: x(BUDGET) + 6, y: box.top + 11, class: "strong" }, `← within ${BUDGET}`));
    for (const s of SCHEMES) {
      if (s === scheme) continue;
      s.mse.forEach((e, i) => made.push(mark("o", x(total(s, SIZES[i])), y(e), 2.6, { class: "other" })));
    }
    const points = scheme.mse.map((e, i) => `${x(total(scheme, SIZES[i]))} ${y(e)}`);
    made.push(svg("path", { d: `M${points.join("L")}`, class: "trail" }));
    scheme.mse.forEach((e, i) => made.push(mark("o", x(total(scheme, SIZES[i])), y(e), 4, { class: "mine" })));
    made.push(mark("D", x(total(scheme, SIZES[at])), y(scheme.mse[at]), 7, { class: "here" }));
    made.push(svg("text", { x: (box.left + box.right) / 2, y: h - 4, "text-anchor": "middle" }, "bits per weight, stretched near 4"));
    return made;
  }

  function update(speak = true) {
    width.node.disabled = Boolean(scheme.group);  // the codes of the second level take their place
    const n = SIZES[at], pieces = cost(scheme, n), bits = total(scheme, n), fits = bits <= BUDGET;
    const names = { codes: "codes", constants: scheme.group ? "absmax codes" : "absmax", groups: "group absmax" };
    bar.replaceChildren(...Object.entries(pieces).filter(([, b]) => b).map(([key, b]) =>
      el("span", { class: key, style: `width:${(100 * b) / 6}%` })));
    legend.replaceChildren(...Object.entries(pieces).filter(([, b]) => b).map(([key, b]) =>
      el("span", {}, el("i", { class: key }), `${names[key]} ${fixed(b, 6).replace(/\.?0+$/, "")}`)));
    out.set("bits", fixed(bits, 6).replace(/\.?0+$/, ""), fits ? `✓ within ${BUDGET}` : `✗ above ${BUDGET}`, bits);
    for (const [key, billions] of [["small", MODELS[0]], ["large", MODELS[1]]]) {
      const gb = gigabytes(billions, bits);
      out.set(key, `${fixed(gb, 2)}\u00a0GB`, `${fixed(gb / 1.073741824, 2)}\u00a0GiB; bfloat16\u00a0${gigabytes(billions, 16)}\u00a0GB`, gb);
    }
    const best = SCHEMES.flatMap((s) => s.mse.filter((_, i) => total(s, SIZES[i]) <= BUDGET));
    const least = fits && scheme.mse[at] === Math.min(...best);
    out.set("error", short(scheme.mse[at]), least ? "★ the least within the budget" : "mean squared, variance\u00a01", scheme.mse[at]);
    plot.describe(`Mean squared error against bits per weight, ${SCHEMES.length} ways to store constants at ${SIZES.length} ` +
      `block sizes. Chosen: ${scheme.long}, blocks of ${n}: ${fixed(bits, 4)} bits, error ${short(scheme.mse[at])}.`);
    plot.redraw();
    if (speak) say(`${fixed(bits, 4)} bits per weight, ${fits ? "within" : "above"} ${BUDGET}. A 70 billion model takes ` +
      `${fixed(gigabytes(70, bits), 2)} gigabytes. Error ${short(scheme.mse[at])}${least ? ", the least within the budget" : ""}.`);
  }

  update(false);
  return [el("div", { class: "controls" }, size.node, width.node, twice.node),
    el("figure", {}, bar, legend), out.node,
    el("figure", {}, plot.node, el("figcaption", {},
      "Each dot is a setting, one of five ways to store an absmax in blocks of one of nine sizes. " +
      "Joined: the way you chose. Diamond: your setting."))];
}

mount("bits", CSS, {
  title: "Where the half bit goes",
  question: `You may spend ${BUDGET} bits per weight. Which block size, with which constants, has the least error?`,
  look: "several settings cost nearly the same bits, and their errors differ. Many blocks with cheap constants beat few blocks with exact ones.",
  parts,
});
