// One warp of the dequantization kernel, instruction by instruction and thread by thread.
const { kernels: TRACES, sector_bytes: SECTOR, banks: BANKS } = DATA;
const WARP = 32;

// The line behind each instruction: the codes, the absmax, and for each weight a lookup and a store.
const lines = (table) => ["byte = packed[i]", "scale = absmax[2 * i // 64]", `${table[0]}[${table[1]}]`, "out[2 * i] = …",
  `${table[2]}[${table[3]}]`, "out[2 * i + 1] = …"];
const TOLD = {
  "v1": ["v1: a byte a thread", "Thread i takes byte i of the codes and writes weights 2i and 2i + 1.",
    lines(["levels", "byte >> 4", "levels", "byte & 15"])],
  "v2": ["v2: levels in shared memory", "As v1, with a copy of the 16 levels beside the arithmetic units.",
    lines(["table", "byte >> 4", "table", "byte & 15"])],
  "v3": ["v3: 16 bytes a store", "Thread i takes bytes 4i to 4i + 3 and writes eight weights at once.",
    ["word = load_codes(packed, i)", "scale = absmax[8 * i // 64]",
      ...[0, 1, 2, 3].flatMap((k) => [`table[byte >> 4]  # byte ${k} of the word`, `table[byte & 15]  # byte ${k} of the word`]),
      "store16(out, i, values)"]],
  "block a thread": ["a block a thread", "Thread i decodes block i, byte after byte. Shown is the first of 32 rounds; " +
    "the later ones find these sectors again only if a cache has kept them.",
    ["scale = absmax[i]", "byte = packed[32 * i + k]", "levels[byte >> 4]", "out[64 * i + 2 * k] = …", "levels[byte & 15]",
      "out[64 * i + 2 * k + 1] = …"]],
  "byte table": ["tables of 256", "As v2, with two tables of 256 levels, looked up by the whole byte: no shift and no mask.",
    lines(["high", "byte", "low", "byte"])],
};
const KERNELS = TRACES.map((trace) => {
  const [label, note, code] = TOLD[trace.name];
  return { ...trace, label, note, code };
});

const what = ({ doing, array, width }) => {
  const names = { packed: width > 1 ? "four bytes of codes" : "a byte of codes", absmax: "the absmax", levels: "a level",
    table: "a level", high: "the high level of a byte", low: "the low level of a byte",
    out: width > 2 ? "eight weights" : "a weight" };
  return `${doing} ${names[array]}`;
};
const place = ({ space, array }) => (space === "shared" ? `shared memory, ${array}` : `memory, ${array}`);

// What the first n threads of an instruction touch: sectors of memory with the bytes wanted, or banks with their words.
function touch(step, n = WARP) {
  const wanted = new Set();
  for (let t = 0; t < n; t++) for (let b = 0; b < step.width; b++) wanted.add(step.bytes[t] + b);
  const sectors = new Set([...wanted].map((byte) => Math.floor(byte / SECTOR)));
  const banks = Array.from({ length: BANKS }, () => []);
  for (const word of new Set([...wanted].map((byte) => Math.floor(byte / 4)))) banks[word % BANKS].push(word);
  return { wanted, sectors, banks, ways: Math.max(...banks.map((words) => words.length)),
    moved: SECTOR * sectors.size, share: wanted.size / (SECTOR * sectors.size) };
}
function sum(kernel) {
  const global = kernel.steps.filter((step) => step.space === "global"), shared = kernel.steps.filter((step) => step.space === "shared");
  const found = global.map((step) => touch(step));
  const total = (key) => found.reduce((all, one) => all + one[key], 0);
  return { requests: global.length, sectors: found.reduce((all, one) => all + one.sectors.size, 0), moved: total("moved"),
    wanted: found.reduce((all, one) => all + one.wanted.size, 0),
    ways: shared.length ? Math.max(...shared.map((step) => touch(step).ways)) : 0 };
}

function parts(say) {
  let kernel = KERNELS[0], at = 0, threads = WARP, timer = 0;
  const pick = choice({ label: "kernel", options: KERNELS.map((k) => [k.name, k.label]), value: kernel.name,
    change: (name) => { kernel = KERNELS.find((k) => k.name === name); at = 0; threads = WARP; halt(); fit(); update(); } });
  const instruction = slider({ label: "instruction", min: 0, max: 5, value: 0,
    text: (i) => `${i + 1} of ${kernel.steps.length}`, spoken: (i) => `${i + 1}, ${what(kernel.steps[i] || kernel.steps[0])}`,
    change: (i) => { at = i; threads = WARP; halt(); update(); } });
  const lanes = slider({ label: "threads that have asked", min: 1, max: WARP, value: WARP, text: (n) => `${n} of ${WARP}`,
    change: (n) => { threads = n; halt(); update(); } });
  const play = el("button", { class: "main", type: "button", click: run }, "Thread by thread");
  const next = el("button", { type: "button", click: () => { at = (at + 1) % kernel.steps.length; threads = WARP; halt(); update(); } }, "Next instruction");
  const note = el("p", { class: "note" });
  const code = el("code"), doing = el("span");
  const line = el("p", { class: "line" }, code, doing);
  const out = readouts({ now: "this instruction", share: "bytes wanted", requests: "requests to memory", sectors: "sectors of 32 bytes" });
  const plot = chart("", (w) => height(w), draw);
  const caption = el("figcaption");

  function fit() {
    instruction.input.max = kernel.steps.length - 1;
    instruction.set(at);
  }
  function halt() { clearInterval(timer); timer = 0; }
  function run() {
    if (stillness()) {  // a step a press instead of a film
      threads = threads === WARP ? 1 : threads + 1;
      return update();
    }
    halt();
    threads = 0;
    timer = setInterval(() => {
      threads += 1;
      if (threads >= WARP) halt();
      update(threads >= WARP);
    }, 110);
    return undefined;
  }

  const LANE = 34;
  function rows() {
    return [...touch(kernel.steps[at]).sectors].sort((a, b) => a - b);
  }
  function height() {
    const step = kernel.steps[at];
    if (step.space === "shared") return LANE + 52 + 20 * Math.max(3, touch(step).ways);
    return LANE + 26 + Math.max(13 * rows().length, 40);
  }

  function draw(w, h) {
    const step = kernel.steps[at], left = 58, cell = (w - left - 2) / WARP, made = [];
    made.push(svg("text", { x: left - 8, y: 17, "text-anchor": "end" }, "threads"));
    for (let t = 0; t < WARP; t++) {
      const state = t === threads - 1 && threads < WARP ? "lane now" : t < threads ? "lane done" : "lane";
      made.push(svg("rect", { x: left + t * cell + 0.5, y: 4, width: cell - 1, height: 18, rx: 2, class: state }));
    }
    return made.concat(step.space === "shared" ? drawBanks(step, left, cell, h) : drawSectors(step, left, cell));
  }

  function drawSectors(step, left, cell) {
    const made = [], done = touch(step, threads), now = new Set(), order = rows();
    for (let b = 0; b < step.width; b++) now.add(step.bytes[threads - 1] + b);
    order.forEach((sector, r) => {
      const y = LANE + 6 + 13 * r, asked = done.sectors.has(sector);
      made.push(svg("text", { x: left - 8, y: y + 9.5, "text-anchor": "end", class: "address" }, `${SECTOR * sector}`));
      made.push(svg("rect", { x: left, y, width: SECTOR * cell, height: 11, class: asked ? "sector moved" : "sector" }));
      for (let b = 0; b < SECTOR; b++) {
        const byte = SECTOR * sector + b;
        if (!done.wanted.has(byte)) continue;
        const current = threads < WARP && now.has(byte);
        made.push(svg("rect", { x: left + b * cell + 0.4, y: y + 1, width: cell - 0.8, height: 9, class: current ? "byte now" : "byte" }));
      }
    });
    return made;
  }

  function drawBanks(step, left, cell, h) {
    const made = [], whole = touch(step), done = touch(step, threads), foot = h - 30;
    const now = Math.floor(step.bytes[threads - 1] / 4);
    made.push(svg("text", { x: left - 8, y: foot + 16, "text-anchor": "end" }, "bank"));
    whole.banks.forEach((words, bank) => {
      const x = left + bank * cell;
      made.push(svg("line", { x1: x + 1, x2: x + cell - 1, y1: foot + 2, y2: foot + 2, class: "axis" }));
      if (bank % 4 === 0) made.push(svg("text", { x: x + cell / 2, y: foot + 16, "text-anchor": "middle" }, String(bank)));
      done.banks[bank].forEach((word, k) => made.push(svg("rect", { x: x + 0.5, y: foot - 20 * (k + 1), width: cell - 1, height: 18, rx: 2,
        class: `${threads < WARP && word === now ? "byte now" : k ? "byte conflict" : "byte"}` })));
    });
    for (let k = 1; k <= whole.ways; k++) made.push(svg("text", { x: left - 8, y: foot - 20 * k + 13, "text-anchor": "end" }, `pass ${k}`));
    return made;
  }

  function update(speak = true) {
    const step = kernel.steps[at], whole = touch(step), done = touch(step, Math.max(threads, 1)), all = sum(kernel);
    if (threads < 1) threads = 1;
    fit();
    lanes.set(threads);
    note.textContent = kernel.note;
    code.textContent = kernel.code[at];
    doing.textContent = what(step);
    const shared = step.space === "shared";
    out.set("now", shared ? `${done.ways} ${done.ways > 1 ? "passes" : "pass"}` : `${done.sectors.size} ${done.sectors.size > 1 ? "sectors" : "sector"}`,
      shared ? (done.ways > 1 ? `${done.ways}-way bank conflict` : "no bank conflict") : `${done.moved} bytes moved`, shared ? done.ways : done.sectors.size);
    out.set("share", shared ? "–" : percent(done.share, 0), shared ? "nothing moves from memory" : `${done.wanted.size} of ${done.moved}`, shared ? "" : done.share);
    const scale = 256 / kernel.weights;
    out.set("requests", String(all.requests), scale === 1 ? `for ${kernel.weights} weights` : `for ${kernel.weights}; ${+(all.requests * scale).toFixed(2)} for 256`, all.requests);
    out.set("sectors", String(all.sectors), `${all.moved} bytes, ${percent(all.wanted / all.moved, 0)} wanted`, all.sectors);
    const lie = shared ? `Banks of ${place(step)}: each column is a bank, each box a 4-byte word that a thread wants from it. Two boxes in one column are two passes; threads that want the same word share it.`
      : `Each row is a sector of 32 bytes of ${place(step)}, with its address. Filled: bytes that a thread wants. Hollow: bytes that are moved and not wanted.`;
    caption.textContent = lie;
    const result = shared ? `${whole.ways} ${whole.ways > 1 ? "passes, a bank conflict" : "pass, no bank conflict"}`
      : `${whole.sectors.size} ${whole.sectors.size > 1 ? "sectors" : "sector"}, ${percent(whole.share, 0)} of their bytes wanted`;
    plot.describe(`${kernel.label}, instruction ${at + 1}, ${what(step)}, ${place(step)}: ${result}.`);
    plot.redraw();
    if (speak) say(`Instruction ${at + 1}, ${what(step)}, ${threads} of ${WARP} threads: ` +
      (shared ? `${done.ways} ${done.ways > 1 ? "passes" : "pass"}.` : `${done.sectors.size} sectors, ${percent(done.share, 0)} of their bytes wanted.`));
  }

  update(false);
  return [el("div", { class: "controls one" }, pick.node), note,
    el("div", { class: "controls after" }, instruction.node, lanes.node), el("div", { class: "row after" }, play, next),
    el("figure", {}, line, plot.node, caption), out.node];
}

mount("warp", CSS, {
  title: "Thirty-two threads ask at once",
  question: "Step through v1. Which of its instructions move bytes that no thread wants? Then find the kernel whose stores leave no hole.",
  look: "rows with holes: whole sectors move for them. And in the tables of 256, boxes that pile up: those save arithmetic, and their lookups wait for each other.",
  parts,
});
