"use strict";
// Draws the page from the JSON beside it. Text only ever enters through textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const NS = "http://www.w3.org/2000/svg";
const NUM_COLOURS = 7;
const MAX_NAMED = 12; // rows with a legend entry and a colour of their own

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function draw(parent, tag, attributes, text) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function table(head, rows) {
  const element = make("table");
  const top = make("thead");
  const line = make("tr");
  head.forEach((name) => line.append(make("th", name, { scope: "col" })));
  top.append(line);
  const body = make("tbody");
  for (const row of rows) {
    const tr = make("tr");
    row.forEach((cell, i) => tr.append(i ? make("td", cell) : make("th", cell, { scope: "row" })));
    body.append(tr);
  }
  element.append(top, body);
  return element;
}

const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value) => `${number(100 * value, 1)} %`;

// --- curves ------------------------------------------------------------------------------------

const hidden = new Set(); // rows whose runs are not drawn; MAX_NAMED stands for all others
const rowKey = (row) => Math.min(row, MAX_NAMED);
const colour = (row) => (row < MAX_NAMED ? `var(--c${row % NUM_COLOURS})` : "var(--soft)");

function marker(parent, row, x, y, size, extra = {}) {
  const shapes = ["M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0", "M-.9-.9H.9V.9H-.9Z", "M0-1.1L1,.8H-1Z", "M0-1.2L1,0L0,1.2L-1,0Z", "M0,1.1L1-.8H-1Z"];
  const shape = row < MAX_NAMED ? shapes[(row + Math.floor(row / NUM_COLOURS)) % shapes.length] : shapes[0];
  return draw(parent, "path", { d: shape, transform: `translate(${x},${y}) scale(${size})`, fill: colour(row), ...extra });
}

function drawLegend() {
  const legend = byId("legend");
  const entries = data.rows.slice(0, MAX_NAMED).map((row, i) => [row.name, i]);
  if (data.rows.length > MAX_NAMED) entries.push([`${data.rows.length - MAX_NAMED} more`, MAX_NAMED]);
  for (const [name, row] of entries) {
    const button = make("button", undefined, { type: "button", "aria-pressed": "true" });
    const sample = draw(button, "svg", { viewBox: "0 0 28 14", "aria-hidden": "true" });
    draw(sample, "path", { d: "M0,7H28", stroke: colour(row), "stroke-width": 2 });
    marker(sample, row, 14, 7, 5);
    button.append(make("span", name));
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      if (shown) hidden.add(row);
      else hidden.delete(row);
      drawChart();
    });
    legend.append(button);
  }
}

let spots = []; // drawn points: { x, y, curve, point }
let chosen = -1;

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) found.push(Number(value.toFixed(6)));
  return found;
}

function drawChart() {
  const svg = byId("chart").querySelector("svg");
  svg.replaceChildren();
  choose(-1);
  const width = Math.max(260, byId("chart").clientWidth);
  const height = width < 600 ? 300 : 420;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  const box = { left: 48, right: width - 14, top: 26, bottom: height - 46 };
  const all = data.curves.flatMap((curve) => curve.points);
  const values = all.map((point) => point.value);
  const pad = 0.06 * (Math.max(...values) - Math.min(...values)) || 1;
  const low = Math.min(...values) - pad;
  const high = Math.max(...values) + pad;
  const most = Math.max(...all.map((point) => point.ratio), 0.1) * 1.02;
  const x = (ratio) => box.left + (ratio / most) * (box.right - box.left);
  const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  for (const value of ticks(low, high, height / 70)) {
    draw(svg, "line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) });
    draw(svg, "text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, String(value));
  }
  for (const ratio of ticks(0, 100 * most, width / 110)) {
    draw(svg, "text", { x: x(ratio / 100), y: box.bottom + 20, "text-anchor": "middle" }, String(ratio));
  }
  draw(svg, "text", { class: "axis-name", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, "FLOPs removed (%)");
  draw(svg, "text", { class: "axis-name", x: 4, y: 14 }, data.axis);
  if (data.dense !== null) {
    draw(svg, "line", { class: "dense", x1: box.left, x2: box.right, y1: y(data.dense), y2: y(data.dense) });
    draw(svg, "text", { x: box.right, y: y(data.dense) - 6, "text-anchor": "end" }, `dense ${number(data.dense, 1)}`);
  }
  spots = [];
  const order = data.curves.map((_, i) => i).sort((a, b) => data.curves[b].row - data.curves[a].row);
  for (const index of order) {
    const curve = data.curves[index];
    if (hidden.has(rowKey(curve.row))) continue;
    const path = curve.points.map((p, i) => `${i ? "L" : "M"}${x(p.ratio).toFixed(1)},${y(p.value).toFixed(1)}`).join("");
    const kind = curve.row < MAX_NAMED ? "curve" : "curve other";
    draw(svg, "path", { class: kind, d: path, stroke: colour(curve.row), "data-run": curve.run });
    for (const point of curve.points) {
      marker(svg, curve.row, x(point.ratio), y(point.value), curve.row < MAX_NAMED ? 4.5 : 2.5);
      spots.push({ x: x(point.ratio), y: y(point.value), curve, point });
    }
  }
  draw(svg, "circle", { class: "chosen", id: "chosen", r: 9, visibility: "hidden" });
}

function choose(index) {
  chosen = index;
  const tip = byId("tooltip");
  const ring = byId("chosen");
  if (index < 0 || !spots[index]) {
    tip.hidden = true;
    if (ring) ring.setAttribute("visibility", "hidden");
    return;
  }
  const { x, y, curve, point } = spots[index];
  ring.setAttribute("visibility", "visible");
  ring.setAttribute("cx", x);
  ring.setAttribute("cy", y);
  const lines = [
    curve.run,
    `${percent(point.ratio)} of FLOPs removed: ${number(point.value, 2)} ${data.unit}`,
    `${number(point.gmacs, 4)} GFLOPs, ${number(point.params / 1e6, 2)} M parameters`,
    point.speed_up === null ? null : `${number(point.speed_up, 2)} times as fast as dense`,
    `${curve.method}, seed ${curve.seed}`,
    curve.spec,
  ];
  tip.replaceChildren(...lines.filter(Boolean).map((line) => make("div", line)));
  tip.hidden = false;
  const room = byId("chart").clientWidth;
  const left = Math.min(Math.max(0, x + 14), Math.max(0, room - tip.offsetWidth));
  const above = y - tip.offsetHeight - 14;
  tip.style.left = `${left}px`;
  tip.style.top = `${above >= 0 ? above : y + 14}px`;
}

function listen() {
  const svg = byId("chart").querySelector("svg");
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const [px, py] = [event.clientX - frame.left, event.clientY - frame.top];
    let nearest = -1;
    let best = 30 ** 2;
    spots.forEach((spot, i) => {
      const distance = (spot.x - px) ** 2 + (spot.y - py) ** 2;
      if (distance < best) [nearest, best] = [i, distance];
    });
    if (nearest !== chosen) choose(nearest);
  });
  svg.addEventListener("pointerleave", () => choose(-1));
  svg.addEventListener("blur", () => choose(-1));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const turn = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") return choose(-1);
    if ((!step && !turn) || !spots.length) return;
    event.preventDefault();
    if (chosen < 0) return choose(0);
    if (step) return choose((chosen + step + spots.length) % spots.length);
    const runs = [...new Set(spots.map((spot) => spot.curve))];
    const next = runs[(runs.indexOf(spots[chosen].curve) + turn + runs.length) % runs.length];
    choose(spots.findIndex((spot) => spot.curve === next));
  });
  new ResizeObserver(drawChart).observe(byId("chart"));
}

function fillTables() {
  const at = data.ratios.map((ratio) => `${data.metric} at ${Number(ratio.toFixed(3))}`);
  const area = `mean from ${Number(data.span[0].toFixed(3))} to ${Number(data.span[1].toFixed(3))}`;
  byId("rows-table").append(table(["run", "method", "seeds", ...at, area], data.rows.map((row) => [row.name, row.method, row.seeds, ...row.values, row.area])));
  byId("paired-note").textContent = data.paired.length
    ? `Difference to ${data.baseline}, paired by seed, with 95 % bootstrap intervals over the pairs:`
    : "No two rows share a seed, so there are no paired differences.";
  if (data.paired.length) byId("paired-table").append(table(["run", "pairs", ...at, area], data.paired));
  byId("front-table").append(table(["run", "GFLOPs", data.metric, "ratio"], data.front));
  const points = data.curves.flatMap((curve) =>
    curve.points.map((p) => [curve.run, curve.method, curve.seed, number(p.ratio, 3), number(p.value, 2), number(p.gmacs, 4), number(p.params / 1e6, 3), number(p.speed_up, 2)]));
  byId("points-table").append(table(["run", "method", "seed", "ratio", data.metric, "GFLOPs", "M parameters", "speed-up"], points));
}

// --- one run -----------------------------------------------------------------------------------

const SIGNS = { sweep: "◇", explore: "○", greedy: "●", fixed: "■" };
const MODE_COLOURS = { vision_params: 0, language_params: 1, cross_params: 2, vision_tokens: 3, language_tokens: 4 };
const modeName = (mode) => mode.replaceAll("_", " ").replaceAll("+", " + ");

function timeline(run) {
  const modes = data.modes.filter((mode) => run.stages.some((stage) => stage.mode.split("+").includes(mode)));
  const rows = modes.map((mode) => [modeName(mode), ...run.stages.map((s) => (s.mode.split("+").includes(mode) ? SIGNS[s.choice] || "●" : ""))]);
  const element = table(["stage", ...run.stages.map((stage) => stage.stage)], rows);
  element.querySelectorAll("tbody tr").forEach((tr, i) => {
    tr.querySelectorAll("td").forEach((td, k) => {
      td.style.color = `var(--c${MODE_COLOURS[modes[i]] ?? 6})`;
      const stage = run.stages[k];
      if (td.textContent) td.title = `stage ${stage.stage}: ${modeName(stage.mode)} (${stage.choice}), ratio ${number(stage.ratio, 3)}`;
    });
  });
  return element;
}

function bars(entries, tint) {
  const box = make("div", undefined, { class: "bars" });
  const most = Math.max(...entries.map(([, value]) => value), 1e-9);
  entries.forEach(([name, value], i) => {
    const bar = make("div", undefined, { class: "bar" });
    bar.style.width = `${(100 * Math.max(0, value)) / most}%`;
    bar.style.background = tint(name, i);
    box.append(make("span", modeName(name)), bar, make("span", percent(value)));
  });
  return box;
}

function heat(dense, left) {
  const cells = {};
  let layers = 0;
  for (const [key, whole] of Object.entries(dense)) {
    const [encoder, layer, part] = key.split(".");
    if (!(key in left) || !whole) continue;
    layers = Math.max(layers, Number(layer) + 1);
    (cells[`${encoder} ${part}`] ??= {})[layer] = [left[key], whole];
  }
  const numbers = Array.from({ length: layers }, (_, i) => i);
  const element = table(["layer", ...numbers.map((i) => i + 1)], Object.entries(cells).map(([name, row]) => [name, ...numbers.map((i) => (row[i] ? Math.round((100 * row[i][0]) / row[i][1]) : ""))]));
  element.querySelectorAll("tbody tr").forEach((tr, r) => {
    const [name, row] = Object.entries(cells)[r];
    tr.querySelectorAll("td").forEach((td, i) => {
      if (!row[i]) return;
      td.style.background = `rgba(var(--heat), ${(0.5 * row[i][0]) / row[i][1]})`;
      td.title = `${name}, layer ${i + 1}: ${Number(row[i][0].toFixed(1))} of ${Number(row[i][1].toFixed(1))}`;
    });
  });
  return element;
}

function showRun() {
  const run = data.runs[byId("run").selectedIndex];
  const ratios = byId("ratio");
  const wanted = ratios.value;
  ratios.replaceChildren(...run.points.map((point) => make("option", number(point.ratio, 3))));
  ratios.value = [...ratios.options].some((option) => option.value === wanted) ? wanted : ratios.options[ratios.options.length - 1]?.value;
  byId("run-spec").textContent = `${run.method}, seed ${run.seed}${run.spec ? `: ${run.spec}` : ""}`;
  const known = run.stages.length > 0;
  byId("timeline").replaceChildren(known ? timeline(run) : make("p", "This run's stages are not known."));
  byId("stages-table").replaceChildren(table(["stage", "mode", "choice", "ratio", "val", "cost"], run.stages.map((s) => [s.stage, modeName(s.mode), s.choice, number(s.ratio, 3), number(s.val, 2), number(s.cost, 2)])));
  byId("shares").replaceChildren(known ? bars(Object.entries(run.shares), (name) => `var(--c${MODE_COLOURS[name.split("+")[0]] ?? 6})`) : make("p", "Not known."));
  showLayers();
}

function showLayers() {
  const run = data.runs[byId("run").selectedIndex];
  const point = run.points[byId("ratio").selectedIndex];
  const known = point && Object.keys(point.layers).length && Object.keys(run.dense).length;
  byId("layers").replaceChildren(known ? heat(run.dense, point.layers) : make("p", "This run did not record its layers."));
}

function fillRun() {
  if (!data.runs.length) return void (byId("run-section").hidden = true);
  byId("run").append(...data.runs.map((run) => make("option", run.run)));
  const present = new Set(data.runs.flatMap((run) => run.stages.map((stage) => stage.choice)));
  const words = { sweep: "first visit", explore: "explored", greedy: "cheapest so far", fixed: "fixed order" };
  byId("timeline-key").textContent = [...present].map((choice) => `${SIGNS[choice] || "●"} ${words[choice] || choice}`).join(", ");
  byId("run").addEventListener("change", showRun);
  byId("ratio").addEventListener("change", showLayers);
  showRun();
}

// --- settings and images -----------------------------------------------------------------------

function fillImportances() {
  if (!data.importances.length) return void (byId("importances-section").hidden = true);
  for (const { study, values } of data.importances) {
    byId("importances").append(make("h3", study), bars(values, () => "var(--c0)"));
  }
}

function cover(side, kept) {
  const svg = document.createElementNS(NS, "svg");
  svg.setAttribute("viewBox", `0 0 ${side} ${side}`);
  const squares = [...kept].map((bit, i) => (bit === "1" ? "" : `M${i % side},${Math.floor(i / side)}h1v1h-1z`));
  draw(svg, "path", { d: squares.join("") });
  return svg;
}

function fillExamples() {
  if (!data.examples.images.length) return void (byId("examples-section").hidden = true);
  byId("examples-note").textContent = data.examples.note;
  data.examples.images.forEach((image, n) => {
    const strip = make("div", undefined, { class: "image" });
    for (const { layer, kept } of image.layers) {
      const count = [...kept].filter((bit) => bit === "1").length;
      const text = layer === 0 ? `image ${n + 1}` : `layer ${layer}: ${count} of ${kept.length}`;
      const frame = make("figure");
      const picture = make("div", undefined, { class: "picture" });
      picture.append(make("img", undefined, { src: image.source, alt: layer === 0 ? `validation image ${n + 1}` : "" }));
      if (layer > 0) picture.append(cover(image.side, kept));
      frame.append(picture, make("figcaption", text));
      strip.append(frame);
    }
    byId("examples").append(strip);
  });
}

byId("subtitle").textContent = data.subtitle;
byId("made").textContent = data.made;
drawLegend();
fillTables();
fillRun();
fillImportances();
fillExamples();
listen();
