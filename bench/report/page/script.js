"use strict";
// Makes the page from the JSON in it. Every figure that is shown stands there; cells keep it in data-value.

const DATA = JSON.parse(document.getElementById("report").textContent);
const POINTS = DATA.configurations.map((figures, id) => ({ ...figures, id }));
const SEVERAL = DATA.reports.length > 1;
const WITH_PAGES = POINTS.some((p) => p.modality === "image");
const TASKS = [...new Set(POINTS.map((p) => p.task))];
const ONE = WITH_PAGES ? "One text or page" : "One text";

// ---- what figures are called, and how they are written -----------------------------------------------------

const digits = (value, significant) =>
  value.toLocaleString("en", { maximumSignificantDigits: significant, useGrouping: false });
const fixed = (value, places) => value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
const WRITTEN = {
  share: (v) => `${fixed(v * 100, 2)} %`,
  points: (v) => fixed(v * 100, 2),
  ms: (v) => `${digits(v, 3)} ms`,
  bytes: (v) => (v >= 1e9 ? `${digits(v / 1e9, 3)} GB` : `${digits(v / 1e6, 3)} MB`),
  perSecond: (v) => digits(v, 3),
  plain: (v) => String(v),
  count: (v) => fixed(v, 0),
  cosine: (v) => fixed(v, v > 0.9999 ? 7 : 4),
  ratio: (v) => fixed(v, 2),
};
const COLUMNS = [
  { key: "precision", title: "Precision", head: true },
  { key: "bundle", title: "Bundle", when: SEVERAL },
  { key: "layout", title: "Layout", when: SEVERAL },
  { key: "task", title: "Task" },
  { key: "modality", title: "Modality", when: WITH_PAGES },
  { key: "max_pixels", title: "Pixels of a page", unit: "plain", when: WITH_PAGES },
  { key: "page_tokens", title: "Tokens of a page", unit: "count", when: WITH_PAGES },
  { key: "dim", title: "Dimensions", unit: "plain" },
  { key: "output_format", title: "Vectors" },
  { key: "share", title: "Quality kept", unit: "share" },
  { key: "share_low", title: "from", unit: "share" },
  { key: "share_high", title: "to", unit: "share" },
  { key: "quality", title: "Value, points", unit: "points" },
  { key: "latency_p50_ms", title: `${ONE}, median`, unit: "ms" },
  { key: "latency_p95_ms", title: `${ONE}, 95th percentile`, unit: "ms" },
  { key: "latency_slow_ms", title: "of the slowest times", unit: "ms" },
  { key: "texts_per_s", title: "Texts/s", unit: "perSecond" },
  { key: "cold_start_ms", title: "Cold start", unit: "ms" },
  { key: "memory_bytes", title: "Peak memory", unit: "bytes" },
  { key: "disk_bytes", title: "Disk", unit: "bytes" },
  { key: "index_bytes", title: `Index, a million ${WITH_PAGES ? "vectors" : "texts"}`, unit: "bytes" },
  { key: "pareto", title: "Pareto front" },
].filter((column) => column.when !== false);
const FACETS = [
  ["bundle", "Bundle"],
  ["layout", "Layout"],
  ["task", "Task"],
  ["modality", "Modality"],
  ["max_pixels", "Pixels of a page"],
  ["precision", "Precision"],
  ["dim", "Dimensions"],
  ["output_format", "Vectors"],
];
const LIMITS = [
  { key: "share_low", title: "Quality kept at least, %", scale: 0.01, least: true },
  { key: "latency_slow_ms", title: "Latency at most, ms", scale: 1, margin: DATA.margins.time },
  { key: "texts_per_s", title: "Texts/s at least", scale: 1, least: true, margin: DATA.margins.time },
  { key: "memory_bytes", together: "all_tasks_memory_bytes", title: "Memory at most, MB", scale: 1e6, margin: DATA.margins.memory },
  { key: "cold_start_ms", title: "Cold start at most, ms", scale: 1, margin: DATA.margins.time },
  { key: "disk_bytes", together: "all_tasks_disk_bytes", title: "Disk at most, MB", scale: 1e6 },
  { key: "index_bytes", title: "Index at most, MB", scale: 1e6 },
];
const AXES = COLUMNS.filter((c) => ["latency_p95_ms", "memory_bytes", "disk_bytes", "index_bytes", "cold_start_ms"].includes(c.key));
const MISSING = "–";

// ---- elements ----------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "title", "desc", "polyline"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
const byId = (id) => document.getElementById(id);

// ---- tables ------------------------------------------------------------------------------------------------

/** A table whose headings sort it. Columns: key, title, unit (a figure's) and head (names the row). */
function table(caption, columns, rows, mark = () => false) {
  const body = element("tbody");
  const header = element("tr");
  const made = element("table", {}, element("caption", {}, caption), element("thead", {}, header), body);
  let order = { column: null, down: false };
  function fill() {
    const sorted = order.column === null ? rows : [...rows].sort((a, b) => compare(a, b, order.column));
    body.replaceChildren(...sorted.map((row) => line(row, columns, mark(row))));
  }
  function compare(a, b, column) {
    const [x, y] = [a[column.key], b[column.key]];
    if (x === y) return 0;
    if (x === null || x === undefined) return 1;
    if (y === null || y === undefined) return -1;
    const rising = typeof x === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return order.down ? -rising : rising;
  }
  for (const column of columns) {
    const button = element("button", { type: "button", class: "sort" }, column.title);
    const cell = element("th", { scope: "col", "aria-sort": "none", class: column.unit ? "number" : "" }, button);
    button.addEventListener("click", () => {
      order = { column, down: order.column === column && !order.down };
      for (const other of header.children) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      fill();
    });
    header.append(cell);
  }
  fill();
  return { made, show(some) { rows = some; fill(); }, fill };
}

function line(row, columns, chosen) {
  const cells = columns.map((column) => {
    const value = row[column.key];
    const name = column.head ? "th" : "td";
    const scope = column.head ? "row" : undefined;
    if (value === null || value === undefined || value === "") return element(name, { scope, class: column.unit && "number" }, MISSING);
    if (!column.unit) {
      const text = typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
      return element(name, { scope }, text);
    }
    return element(name, { scope, class: "number", "data-value": value }, WRITTEN[column.unit](value));
  });
  return element("tr", { class: chosen ? "chosen" : undefined }, ...cells);
}

// Tables that follow the filters of what they tell apart.
const sections = [];

/** A section of its own with a table that scrolls sideways. */
function section(title, text, caption, columns, rows) {
  if (!rows.length) return;
  const id = `section-${byId("more").children.length}`;
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": id });
  const shown = table(caption, columns, rows);
  scroll.append(shown.made);
  sections.push({ shown, rows });
  const parts = [element("h2", { id }, title)];
  if (text) parts.push(element("p", {}, text));
  byId("more").append(element("section", { "aria-labelledby": id }, ...parts, scroll));
}

// ---- filters and limits ------------------------------------------------------------------------------------

function makeFilters() {
  for (const [key, title] of FACETS) {
    const values = [...new Set(POINTS.map((p) => p[key]))].filter((value) => value !== null && value !== undefined);
    if (values.length < 2) continue;
    const select = element("select", { name: key }, element("option", { value: "" }, "all"));
    for (const value of values) select.append(element("option", { value }, String(value)));
    // A front is of a task and a modality.
    if (key === "task") select.options[1].defaultSelected = true;
    if (key === "modality") [...select.options].find((option) => option.value === DATA.modality).defaultSelected = true;
    byId("facets").append(element("label", {}, title, select));
  }
  for (const limit of LIMITS) {
    if (!POINTS.some((p) => typeof p[limit.key] === "number")) continue;
    const input = element("input", { type: "number", name: limit.key, min: "0", step: "any", inputmode: "decimal" });
    byId("limits").append(element("label", {}, limit.title, input));
  }
}

function filtered() {
  const form = byId("filters");
  const chosen = new FormData(form);
  const limits = LIMITS.filter((limit) => chosen.get(limit.key));
  const shown = POINTS.filter((p) =>
    FACETS.every(([key]) => !chosen.get(key) || String(p[key]) === chosen.get(key)) &&
    (!chosen.get("pareto") || p.pareto));
  // Of all tasks a configuration is the same for each, and costs what all of them cost together.
  const all = TASKS.length > 1 && !chosen.get("task");
  const figure = (p, limit) => p[(all && limit.together) || limit.key];
  const alike = (p) => ["bundle", "precision", "dim", "output_format", "modality", "max_pixels"].map((key) => p[key]).join("|");
  const groups = {};
  for (const p of POINTS) (groups[alike(p)] ??= []).push(p);
  const tasksOf = (modality) => new Set(POINTS.filter((p) => p.modality === modality).map((p) => p.task)).size;
  const together = (p) => (groups[alike(p)].length === tasksOf(p.modality) ? groups[alike(p)] : []);
  const meets = (p, limit) => {
    const parts = all ? together(p) : [p];
    return parts.length > 0 && parts.every((one) => keeps(one, limit));
  };
  const keeps = (p, limit) => {
    const bound = Number(chosen.get(limit.key)) * limit.scale;
    const value = figure(p, limit);
    return typeof value === "number" && (limit.least ? value / (limit.margin ?? 1) >= bound : value * (limit.margin ?? 1) <= bound);
  };
  const fitting = shown.filter((p) => limits.every((limit) => meets(p, limit)));
  const alone = limits.filter((limit) => !shown.some((p) => meets(p, limit)));
  return { shown, fitting, limits, alone, figure };
}

const nameOf = (p) =>
  `${SEVERAL ? `${p.bundle}, ` : ""}${p.task}: ${p.precision}, ${p.dim} dimensions, ${p.output_format} vectors` +
  `${p.max_pixels ? `, pages of at most ${p.max_pixels} pixels` : ""}`;

function written(key, value) {
  return WRITTEN[COLUMNS.find((column) => column.key === key).unit](value);
}

/** The sentence about what fits: the best in quality of each task. */
function answer({ shown, fitting, limits, alone, figure }) {
  if (alone.length) {
    const nearest = alone.map((limit) => {
      const values = shown.map((p) => figure(p, limit)).filter((v) => typeof v === "number");
      if (!values.length) return `${limit.title}: not measured`;
      const best = limit.least ? Math.max(...values) : Math.min(...values);
      return `${limit.title}: the nearest has ${written(limit.key, best)}`;
    });
    return `Nothing meets a limit. ${nearest.join("; ")}.`;
  }
  if (!fitting.length) return limits.length ? "Each limit is met by some, all of them together by none." : "Nothing is shown.";
  const counted = `${fitting.length} of ${POINTS.length} configurations${limits.length ? " keep the limits" : " are shown"}.`;
  const tasks = [...new Set(fitting.map((p) => p.task))];
  const best = tasks.map((task) => bestOf(fitting.filter((p) => p.task === task))).filter(Boolean);
  if (!limits.length || !best.length) return counted;
  return `${counted} Best in quality: ${best.map((p) => `${nameOf(p)} (${written("share", p.share)})`).join("; ")}.`;
}

function bestOf(points) {
  const measured = points.filter((p) => typeof p.share === "number");
  return measured.reduce((a, b) => (!a || b.share > a.share || (b.share === a.share && b.latency_p95_ms < a.latency_p95_ms) ? b : a), null);
}

// ---- the chart ---------------------------------------------------------------------------------------------

// A shape for each precision: colour is never alone.
const SHAPES = ["M-6 0A6 6 0 1 0 6 0A6 6 0 1 0 -6 0Z", "M-5.5 -5.5H5.5V5.5H-5.5Z", "M0 -7L6.5 5H-6.5Z",
  "M0 -7.5L7 0L0 7.5L-7 0Z", "M0 7L6.5 -5H-6.5Z", "M-2 -6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z"];
const PRECISIONS = [...new Set(POINTS.map((p) => p.precision))];
let chosenId = null;
let drawn = [];

const mark = (precision, filled) => {
  const number = PRECISIONS.indexOf(precision) % SHAPES.length;
  const colour = `var(--c${number})`;
  return { d: SHAPES[number], fill: filled ? colour : "var(--paper)", stroke: colour, "stroke-width": 2 };
};

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return found;
}

function draw(points) {
  const place = byId("chart");
  const axis = AXES.find((column) => column.key === byId("axis").value);
  const usable = axis ? points.filter((p) => typeof p[axis.key] === "number" && typeof p.share === "number") : [];
  drawn = [...usable].sort((a, b) => a[axis.key] - b[axis.key] || a.share - b.share);
  if (!drawn.length) {
    place.replaceChildren(element("p", { class: "quiet" }, "No configuration that is shown has both quality and this cost."));
    return;
  }
  const width = Math.max(300, place.clientWidth);
  const narrow = width < 560;
  const height = narrow ? 340 : 420;
  const box = { left: 68, right: width - 24, top: 16, bottom: height - 52 };
  const xs = drawn.map((p) => p[axis.key]);
  const ys = drawn.map((p) => p.share);
  const pad = (low, high) => [low - (high - low || Math.abs(low) || 1) * 0.06, high + (high - low || Math.abs(high) || 1) * 0.06];
  const [x0, x1] = pad(Math.min(...xs), Math.max(...xs));
  const [y0, y1] = pad(Math.min(...ys), Math.max(...ys));
  const x = (v) => box.left + ((v - x0) / (x1 - x0)) * (box.right - box.left);
  const y = (v) => box.bottom - ((v - y0) / (y1 - y0)) * (box.bottom - box.top);
  const title = `Quality kept against ${axis.title.toLowerCase()}`;
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": "chart-name chart-text" },
    element("title", { id: "chart-name" }, title),
    element("desc", { id: "chart-text" }, `The table of configurations has their figures.`));
  for (const at of ticks(Math.max(0, x0), x1, narrow ? 4 : 7)) {
    svg.append(element("line", { class: "grid", x1: x(at), x2: x(at), y1: box.top, y2: box.bottom }),
      element("text", { x: x(at), y: box.bottom + 20, "text-anchor": "middle" }, WRITTEN[axis.unit](at)));
  }
  for (const at of ticks(y0, y1, 6)) {
    svg.append(element("line", { class: "grid", x1: box.left, x2: box.right, y1: y(at), y2: y(at) }),
      element("text", { x: box.left - 8, y: y(at) + 4, "text-anchor": "end" }, `${digits(at * 100, 5)} %`));
  }
  svg.append(element("text", { x: box.right, y: height - 10, "text-anchor": "end" }, `${axis.title} →`));
  if (new Set(drawn.map((p) => `${p.task} ${p.modality}`)).size === 1) svg.append(frontLine(x, y, axis));
  for (const p of drawn) {
    const shape = element("path", { ...mark(p.precision, p.pareto), transform: `translate(${x(p[axis.key])} ${y(p.share)})` },
      element("title", {}, describe(p, axis)));
    shape.addEventListener("click", () => select(p, axis));
    svg.append(shape);
  }
  const chosen = drawn.find((p) => p.id === chosenId);
  if (chosen) {
    svg.append(element("path", { class: "chosen", d: "M-12 0A12 12 0 1 0 12 0A12 12 0 1 0 -12 0Z",
      transform: `translate(${x(chosen[axis.key])} ${y(chosen.share)})` }));
  }
  place.replaceChildren(svg);
}

/** The steps of what is best at each cost, of one task. */
function frontLine(x, y, axis) {
  const corners = [];
  let best = -Infinity;
  for (const p of drawn) {
    if (p.share <= best) continue;
    if (corners.length) corners.push(`${x(p[axis.key])},${y(best)}`);
    best = p.share;
    corners.push(`${x(p[axis.key])},${y(best)}`);
  }
  return element("polyline", { class: "front", points: corners.join(" ") });
}

const describe = (p, axis) =>
  `${nameOf(p)}: ${written("share", p.share)} of the quality, ${axis.title.toLowerCase()} ${WRITTEN[axis.unit](p[axis.key])}` +
  `${p.pareto ? ", on the Pareto front" : ""}`;

function select(p, axis) {
  chosenId = p.id;
  byId("point").textContent = describe(p, axis);
  draw(filtered().fitting);
  configurations.fill();
}

byId("chart").addEventListener("keydown", (event) => {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 1, ArrowDown: -1, Home: -Infinity, End: Infinity };
  if (!(event.key in steps) || !drawn.length) return;
  event.preventDefault();
  const at = drawn.findIndex((p) => p.id === chosenId);
  const next = at < 0 ? 0 : Math.min(drawn.length - 1, Math.max(0, at + steps[event.key]));
  select(drawn[next], AXES.find((column) => column.key === byId("axis").value));
});

// ---- the other tables --------------------------------------------------------------------------------------

function systems() {
  return DATA.reports.flatMap((report) => report.rows.map((row) => {
    const whole = (dims) => (dims ? dims[Object.keys(dims).sort((a, b) => b - a)[0]] : {});
    const quality = whole(Object.values(row.quality)[0]?.dims) ?? {};
    const fidelity = whole(Object.keys(row.fidelity).length ? row.fidelity : null) ?? {};
    const shape = row.shapes["32x32"] ?? {};
    return { ...row, bundle: report.bundle, quality: quality.value, difference: quality.difference, low: quality.low,
      high: quality.high, cosine_mean: fidelity.cosine_mean, cosine_min: fidelity.cosine_min, top10: fidelity.top10_overlap,
      p50: row.single.p50_ms, p95: row.single.p95_ms, texts_per_s: shape.texts_per_s,
      torch: shape.times_as_fast_as?.["torch fp32"] };
  }));
}

function mixed() {
  return DATA.reports.flatMap((report) => report.rows.flatMap((row) =>
    Object.entries(row.quality).flatMap(([set, figures]) =>
      Object.entries(figures.queries ?? {}).map(([queries, at]) => ({ bundle: report.bundle, task: row.task, set, queries,
        documents: row.precision, share: at.reference > 0 ? 1 + at.difference / at.reference : null, ...at })))));
}

function processes() {
  return DATA.reports.flatMap((report) => Object.entries(report.process).map(([system, at]) => ({
    bundle: report.bundle, system, imported: at.imported_ms, first: at.first_vector_ms, longest: at.first_vector_longest_ms,
    open: at.switch_graph_open_ms, closed: at.switch_graph_closed_ms, resident: at.after_first_vector?.resident,
    one: at.after_first_task?.peak, all: at.after_batches?.peak })));
}

function kinds() {
  return DATA.reports.flatMap((report) => report.rows.flatMap((row) => Object.entries(row.fidelity_by_kind).map(
    ([kind, at]) => ({ bundle: report.bundle, task: row.task, system: row.system, kind, ...at }))));
}

/** Each set of pages with its row and report. */
function pageSets() {
  return DATA.reports.flatMap((report) => report.rows.flatMap((row) => Object.entries(row.quality)
    .filter(([, figures]) => figures.modality === "image")
    .map(([set, figures]) => ({ bundle: report.bundle, task: row.task, system: row.system, role: row.role, set, figures }))));
}

function searched() {
  return pageSets().flatMap(({ figures, ...base }) => {
    const full = Object.keys(figures.dims).sort((a, b) => b - a)[0];
    const kinds = [["one a page", figures["ndcg@5"][full], figures.dims[full]],
      ["one a token", figures.multi_vector?.["ndcg@5"], figures.multi_vector?.["ndcg@10"]]];
    return kinds.filter(([, five]) => five).map(([vectors, five, ten]) => ({ ...base, vectors, queries: figures.items,
      pages: figures.pages, five: five.value, five_difference: five.difference, ten: ten.value, ten_difference: ten.difference,
      low: ten.low, high: ten.high }));
  });
}

function budgets() {
  return DATA.reports.flatMap((report) => report.rows.flatMap((row) => Object.entries(row.images ?? {}).map(
    ([pixels, at]) => ({ bundle: report.bundle, task: row.task, system: row.system, pixels: Number(pixels), tokens: at.tokens,
      p50: at.p50_ms, p95: at.p95_ms, five: at.quality?.["ndcg@5"].value, ten: at.quality?.["ndcg@10"].value,
      difference: at.quality?.["ndcg@10"].difference, low: at.quality?.["ndcg@10"].low, high: at.quality?.["ndcg@10"].high }))));
}

function alignments() {
  const seen = new Set();
  return pageSets().filter((one) => one.role !== "torch").flatMap(({ figures, ...base }) => {
    const key = `${base.bundle} ${base.task} ${base.set}`;
    const first = seen.has(key) ? [] : [{ ...base, ...figures.alignment.reference, system: "unquantized" }];
    seen.add(key);
    const formats = Object.entries(figures.alignment.formats ?? {}).map(
      ([format, at]) => ({ ...base, ...at, system: `${base.system}, ${format} vectors` }));
    return [...first, { ...base, ...figures.alignment.value }, ...formats];
  });
}

const bundleColumn = SEVERAL ? [{ key: "bundle", title: "Bundle" }] : [];

function makeTables() {
  section("Queries and documents at different precisions",
    "Documents embedded once at one precision, queries at another. The difference is to the unquantized model on both sides, in points.",
    "Quality of each pair of precisions", [{ key: "documents", title: "Documents", head: true }, ...bundleColumn, { key: "task", title: "Task" }, { key: "set", title: "Set" }, { key: "queries", title: "Queries" },
      { key: "value", title: "Value, points", unit: "points" }, { key: "difference", title: "Difference", unit: "points" },
      { key: "low", title: "from", unit: "points" }, { key: "high", title: "to", unit: "points" }], mixed());
  const system = { key: "system", title: "System", head: true };
  const ofPages = [...bundleColumn, { key: "task", title: "Task" }, { key: "set", title: "Set" }];
  section("Page images", "Pages that questions ask for, by one vector a page and by one a token, with MaxSim.",
    "nDCG of each system on each set of pages", [system, ...ofPages, { key: "vectors", title: "Vectors" },
      { key: "queries", title: "Queries", unit: "plain" }, { key: "pages", title: "Pages", unit: "plain" },
      { key: "five", title: "nDCG@5, points", unit: "points" }, { key: "five_difference", title: "Difference", unit: "points" },
      { key: "ten", title: "nDCG@10, points", unit: "points" }, { key: "ten_difference", title: "Difference", unit: "points" },
      { key: "low", title: "from", unit: "points" }, { key: "high", title: "to", unit: "points" }], searched());
  section("Image budget", "Pages scaled down to at most so many pixels. The difference is to the unquantized model at the source's own budget.",
    "What each budget costs and keeps", [system, ...bundleColumn, { key: "task", title: "Task" },
      { key: "pixels", title: "Pixels", unit: "plain" }, { key: "tokens", title: "Tokens", unit: "count" },
      { key: "p50", title: "One page, median", unit: "ms" }, { key: "p95", title: "95th percentile", unit: "ms" },
      { key: "five", title: "nDCG@5, points", unit: "points" }, { key: "ten", title: "nDCG@10, points", unit: "points" },
      { key: "difference", title: "Difference", unit: "points" }, { key: "low", title: "from", unit: "points" },
      { key: "high", title: "to", unit: "points" }], budgets());
  section("Texts beside images", "Mean cosines of pairs that belong together and that do not, and the distance of the two means.",
    "Alignment of texts and images before and after quantization", [system, ...ofPages,
      { key: "matched", title: "Text and image, matched", unit: "cosine" }, { key: "mismatched", title: "mismatched", unit: "cosine" },
      { key: "texts_matched", title: "Two texts, matched", unit: "cosine" }, { key: "texts_mismatched", title: "mismatched", unit: "cosine" },
      { key: "images_matched", title: "Two images, matched", unit: "cosine" }, { key: "images_mismatched", title: "mismatched", unit: "cosine" },
      { key: "gap", title: "Gap", unit: "cosine" }], alignments());
  section("Beside other systems",
    "All on the same texts with the same threads, every system once a round in turn. Cosines are to the unquantized model.",
    "Each system on each task at the full dimension", [{ key: "system", title: "System", head: true }, ...bundleColumn, { key: "task", title: "Task" }, { key: "bytes_on_disk", title: "Graph and weights", unit: "bytes" },
      { key: "p50", title: "One text, median", unit: "ms" }, { key: "p95", title: "95th percentile", unit: "ms" },
      { key: "texts_per_s", title: "Texts/s, 32 of 32 tokens", unit: "perSecond" },
      { key: "torch", title: "Times as fast as torch", unit: "ratio" }, { key: "cosine_mean", title: "Mean cosine", unit: "cosine" },
      { key: "cosine_min", title: "Least cosine", unit: "cosine" }, { key: "top10", title: "Nearest ten kept", unit: "share" },
      { key: "quality", title: "Quality, points", unit: "points" }, { key: "difference", title: "Difference", unit: "points" },
      { key: "low", title: "from", unit: "points" }, { key: "high", title: "to", unit: "points" }], systems());
  section("A process of its own", "From the start of Python, the files already in the system's cache.",
    "Start, switch of task and memory", [{ key: "system", title: "System", head: true }, ...bundleColumn,
      { key: "imported", title: "Imported", unit: "ms" }, { key: "first", title: "First vector, median", unit: "ms" },
      { key: "longest", title: "longest", unit: "ms" }, { key: "open", title: "Other task, graph open", unit: "ms" },
      { key: "closed", title: "Other task, graph closed", unit: "ms" }, { key: "resident", title: "Resident after it", unit: "bytes" },
      { key: "one", title: "Peak with one task", unit: "bytes" }, { key: "all", title: "Peak with all", unit: "bytes" }], processes());
  section("By kind of text", "", "Cosine to the unquantized model", [{ key: "system", title: "System", head: true }, ...bundleColumn, { key: "task", title: "Task" }, { key: "kind", title: "Kind" }, { key: "texts", title: "Texts", unit: "plain" },
    { key: "cosine_mean", title: "Mean cosine", unit: "cosine" }, { key: "cosine_min", title: "Least cosine", unit: "cosine" }], kinds());
  const notes = DATA.reports.flatMap((report) => report.notes.map((note) => (SEVERAL ? `${report.bundle}: ${note}` : note)));
  if (notes.length) {
    byId("more").append(element("section", { "aria-labelledby": "notes" }, element("h2", { id: "notes" }, "Notes"),
      element("ul", {}, ...notes.map((note) => element("li", {}, note)))));
  }
}

// ---- the page ----------------------------------------------------------------------------------------------

function about() {
  const parts = DATA.reports.map((report) => {
    const machine = report.machine;
    return `${report.bundle}: ${report.source.name}, ${machine.gpu ? `${machine.gpu} beside ` : ""}${machine.processor}, ` +
      `${machine.threads} threads, load ${machine.load_1_min} at the end`;
  });
  byId("about").textContent = `${parts.join(". ")}. Compared with the unquantized model in torch float32.`;
  const versions = DATA.reports[0]?.versions ?? {};
  byId("versions").textContent = Object.entries(versions).map(([name, number]) => `${name} ${number}`).join(", ");
}

let configurations;
function update() {
  const found = filtered();
  byId("answer").textContent = answer(found);
  configurations.show(found.fitting);
  const chosen = new FormData(byId("filters"));
  const kept = (row) => ["bundle", "task"].every((key) => !chosen.get(key) || !row[key] || row[key] === chosen.get(key));
  for (const { shown, rows } of sections) shown.show(rows.filter(kept));
  draw(found.fitting);
}

about();
makeFilters();
for (const axis of AXES.filter((a) => POINTS.some((p) => typeof p[a.key] === "number"))) {
  byId("axis").append(element("option", { value: axis.key }, axis.title));
}
for (const precision of PRECISIONS) {
  byId("legend").append(element("li", {}, element("svg", { viewBox: "-9 -9 18 18", "aria-hidden": "true" },
    element("path", mark(precision, true))), precision));
}
configurations = table("Every configuration that is shown, with what it costs", COLUMNS, POINTS, (p) => p.id === chosenId);
const holder = byId("table-configurations");
for (const [name, value] of Object.entries({ tabindex: "0", role: "region", "aria-labelledby": "configurations" })) holder.setAttribute(name, value);
holder.append(configurations.made);
makeTables();
byId("filters").addEventListener("input", update);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () => setTimeout(update));
byId("axis").addEventListener("change", update);
let lastWidth = 0;
new ResizeObserver(() => {
  const width = byId("chart").clientWidth;
  if (width !== lastWidth) { lastWidth = width; draw(filtered().fitting); }
}).observe(byId("chart"));
update();
