// Every format's error at every block size, in two races: equal block size and equal bits.
const { sizes: SIZES, sources: SOURCES, looks: LOOKS, shown: SHOWN } = DATA;
const FORMATS = Object.keys(LOOKS);
const STEPS = SIZES.map((size) => Math.log2(size / SIZES[0]));
const SLACK = 0.001;  // bits: one scale per tensor is not a block's

// One float32 per block takes 32 / block size bits, so halving those is one step, as doubling the block is.
const stepOfBits = (bits) => Math.log2(32 / SIZES[0] / (bits - 4));
const ENDS = SOURCES.flatMap((source) => Object.values(source.formats)).reduce(([low, high], { bits }) =>
  [Math.min(low, stepOfBits(bits[0])), Math.max(high, stepOfBits(bits[bits.length - 1]))], [0, STEPS[STEPS.length - 1]]);
const bitsOfStep = (step) => 4 + 32 / SIZES[0] / 2 ** step;
const number = (bits) => fixed(bits, 3).replace(/\.?0+$/, "");

function standing(source, format, race, at) {
  const { bits, mse } = SOURCES[source].formats[format];
  const index = race === "block" ? at : bits.findIndex((b) => b <= bitsOfStep(STEPS[at]) + SLACK);
  return index < 0 ? null : { format, index, size: SIZES[index], bits: bits[index], mse: mse[index] };
}

function parts(say) {
  let race = "block", source = 0, at = SIZES.indexOf(64), slide = 0, frame = 0;
  const on = new Set(SHOWN);
  const races = choice({ label: "what is held equal", options: [["block", "block size"], ["bits", "bits per weight"]], value: race,
    change: (key) => { race = key; update(); move(); } });
  const weights = el("select", { "aria-label": "weights", change: () => { source = weights.selectedIndex; update(); } },
    ...SOURCES.map(({ name }) => el("option", {}, name)));
  const where = slider({ label: "equal at", min: 0, max: SIZES.length - 1, value: at,
    text: (i) => (race === "block" ? `blocks of ${SIZES[i].toLocaleString("en")}` : `at most ${number(bitsOfStep(STEPS[i]))} bits`),
    change: (i) => { at = i; update(); } });
  const pills = el("div", { class: "choices" }, ...FORMATS.map((format) => {
    const input = el("input", { type: "checkbox", checked: on.has(format), change: () => {
      on[input.checked ? "add" : "delete"](format);
      update();
    } });
    return el("label", { class: "choice check" }, input, symbol(format), el("span", {}, format));
  }));
  const formats = el("fieldset", { class: "field" }, el("legend", {}, "formats"), pills);
  const body = el("tbody");
  const caption = el("caption");
  const table = el("table", {}, caption, el("thead", {}, el("tr", {},
    ...["format", "block", "bits", "error", "× least"].map((text) => el("th", { scope: "col" }, text)))), body);
  const plot = chart("", (w) => (w < 480 ? 298 : 348), draw);

  function symbol(format) {
    const { color, marker, dash } = LOOKS[format];
    const made = svg("svg", { class: "symbol", width: 26, height: 14, viewBox: "0 0 26 14", "aria-hidden": "true" });
    made.append(svg("line", { x1: 1, x2: 25, y1: 7, y2: 7, "stroke-dasharray": dash, style: `stroke:var(--${color})`, "stroke-width": 2 }),
      mark(marker, 13, 7, 4, { style: `fill:var(--${color})` }));
    return made;
  }

  function move() {  // the lines slide from one race to the other
    cancelAnimationFrame(frame);
    const to = race === "bits" ? 1 : 0;
    if (stillness()) { slide = to; plot.redraw(); return; }
    const from = slide, start = performance.now();
    const tick = (now) => {
      const t = clamp((now - start) / 450, 0, 1);
      slide = from + (to - from) * t * t * (3 - 2 * t);
      plot.redraw();
      if (t < 1) frame = requestAnimationFrame(tick);
    };
    frame = requestAnimationFrame(tick);
  }

  function draw(w, h) {
    const roomy = w >= 480, shown = FORMATS.filter((format) => on.has(format));
    const box = { left: 44, right: w - (roomy ? 104 : 10), top: 26, bottom: h - 38 };
    const all = shown.flatMap((format) => SOURCES[source].formats[format].mse);
    const [low, high] = all.length ? [Math.min(...all) / 1.12, Math.max(...all) * 1.12] : [0.005, 0.03];
    const y = (e) => box.bottom - (Math.log(e / low) / Math.log(high / low)) * (box.bottom - box.top);
    const first = slide * ENDS[0], last = STEPS[STEPS.length - 1] * (1 - slide) + slide * ENDS[1];
    const x = (step) => box.left + 10 + ((step - first) / (last - first)) * (box.right - box.left - 20);
    const made = [svg("text", { x: 0, y: 12 }, "mean squared error over the variance")];
    for (const tick of [0.001, 0.002, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2]) {
      if (tick < low || tick > high) continue;
      made.push(svg("line", { x1: box.left, x2: box.right, y1: y(tick), y2: y(tick), class: "grid" }),
        svg("text", { x: box.left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    }
    for (let step = Math.ceil(first); step <= last + 0.01; step += roomy ? 1 : 2) {
      made.push(svg("text", { x: x(step), y: box.bottom + 16, "text-anchor": "middle" },
        race === "block" ? String(SIZES[0] * 2 ** step) : String(+bitsOfStep(step).toFixed(roomy ? 3 : 2))));
    }
    made.push(svg("text", { x: (box.left + box.right) / 2, y: h - 4, "text-anchor": "middle" },
      race === "block" ? "block size (weights)" : "bits per weight, fewer to the right"));
    made.push(svg("line", { x1: x(STEPS[at]), x2: x(STEPS[at]), y1: box.top, y2: box.bottom, class: "cursor" }));
    const labels = [];
    for (const format of shown) {
      const { bits, mse } = SOURCES[source].formats[format], { color, marker, dash } = LOOKS[format];
      const points = mse.map((e, i) => [x(STEPS[i] + slide * (stepOfBits(bits[i]) - STEPS[i])), y(e)]);
      made.push(svg("path", { d: `M${points.map((p) => p.map((v) => v.toFixed(1)).join(" ")).join("L")}`, class: "curve",
        "stroke-dasharray": dash, style: `stroke:var(--${color})` }));
      const here = standing(source, format, race, at);
      points.forEach(([px, py], i) => {
        const chosen = here && here.index === i;
        made.push(mark(marker, px, py, chosen ? 6 : 3.2, { style: `fill:var(--${color})`, class: chosen ? "chosen" : "" }));
      });
      labels.push([format, ...points[points.length - 1]]);
    }
    if (roomy) {
      labels.sort((a, b) => a[2] - b[2]);
      labels.forEach((label, i) => { if (i) label[2] = Math.max(label[2], labels[i - 1][2] + 14); });
      for (let i = labels.length - 1, floor = box.bottom + 2; i >= 0; i--, floor -= 14) labels[i][2] = Math.min(labels[i][2], floor);
      for (const [format, , py] of labels) {
        const style = `fill:color-mix(in srgb, var(--${LOOKS[format].color}) 70%, var(--ink))`;
        made.push(svg("text", { x: box.right + 6, y: py + 4, class: "strong", style }, format));
      }
    }
    return made;
  }

  function update(speak = true) {
    where.show();
    const race_is = race === "block" ? `blocks of ${SIZES[at]}` : `at most ${number(bitsOfStep(STEPS[at]))} bits`;
    const name = SOURCES[source].name;
    const rows = FORMATS.filter((format) => on.has(format)).map((format) => standing(source, format, race, at) || { format });
    rows.sort((a, b) => (a.mse ?? Infinity) - (b.mse ?? Infinity));
    const least = rows.length && rows[0].mse;
    body.replaceChildren(...rows.map((row, i) => el("tr", {
      class: i === 0 && row.mse ? "first" : "", "data-format": row.format, "data-mse": row.mse ?? "", "data-bits": row.bits ?? "",
      "data-size": row.size ?? "",
    }, el("th", { scope: "row" }, symbol(row.format), row.format),
    ...(row.mse ? [row.size.toLocaleString("en"), number(row.bits), short(row.mse), i ? fixed(row.mse / least, 2) : "least"] : ["none fits", "", "", ""])
      .map((text) => el("td", {}, text)))));
    caption.textContent = `${name}, ${race_is}: mean squared error over the variance`;
    plot.describe(`Error against ${race === "block" ? "block size" : "bits per weight"} on ${name}, one line for each of ${rows.length} formats. ` +
      `At ${race_is} the order from the least error is ${rows.map((row) => row.format).join(", ")}.`);
    plot.redraw();
    if (speak && least) say(`${name}, ${race_is}: ${rows[0].format} has the least error, ${short(least)}` +
      `${rows[1]?.mse ? `; then ${rows[1].format}, ${fixed(rows[1].mse / least, 2)} times as much` : ""}.`);
  }

  update(false);
  const held = el("div", { class: "field" }, el("div", { class: "head" }, "weights"), weights);
  return [el("div", { class: "controls" }, races.node, held, where.node), el("div", { class: "after" }, formats),
    el("figure", {}, plot.node), el("div", { class: "after" }, table)];
}

mount("who_wins", CSS, {
  title: "Two races",
  question: "On normal weights in blocks of 64, uniform beats NF4. Hold the bits equal instead of the block size: which of the two wins now? And on a real layer?",
  look: "in the second race the lines keep their shape and slide sideways, each by what its constants cost.",
  parts,
});
