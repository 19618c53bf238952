"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

const view = {
  graph: 0, open: new Set(), unfolded: false, overlaid: false, hidden: new Set(), query: "", tab: "rewrites",
  chosen: null, metric: "saved_bytes", x: 0, y: 0, zoom: 1,
};
let graph, layout, drawn = null;

// Small things -------------------------------------------------------------------------------------------------------

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children); // texts become text nodes: nothing of a model's is ever parsed as HTML
  return made;
}

function shape(tag, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const key = (...parts) => ["graphs", view.graph, ...parts].join(".");
const sourceOf = (item) => (item.source === null ? null : graph.sources[item.source]);
const valueOf = (node) => (node.dtype ? `${node.dtype}[${node.shape.join(", ")}]` : "");
const measured = () => graph.stages[0].cost !== null;
const stepsWithRewrites = () => graph.stages.filter((stage) => stage.num_rewrites).map((stage) => stage.name);
const colorOf = (step) => { const index = stepsWithRewrites().indexOf(step); return index < 0 ? "" : `p${index % 10}`; };

// Rewrites that build on each other have the color of the last.
const stepOf = (hunk) => graph.rewrites[hunk.rewrites.at(-1)].step;
const titleOf = (hunk) => [...new Set(hunk.rewrites.map((id) => graph.rewrites[id].op))].at(-1);
const rewritten = () => folded(graph.hunks).filter((hunks) => hunks[0].rewrites.length);

// What a number of a stage is called, and from which fields of its cost it is added.
const METRICS = {
  nodes: ["operations", ["num_nodes"], "plain"],
  launches: ["kernel launches", ["cost.launches", "cost.backward_launches"], "plain"],
  casts: ["casts run", ["cost.casts"], "plain"],
  bytes_moved: ["bytes moved", ["cost.bytes_moved", "cost.backward_bytes_moved"], "bytes"],
  flops: ["arithmetic", ["cost.flops", "cost.backward_flops"], "flops"],
  saved_bytes: ["saved for backward", ["cost.saved_bytes"], "bytes"],
  peak_bytes: ["peak of activations", ["peak_bytes"], "bytes"],
};

function metricKeys(name, stage) {
  return METRICS[name][1].map((field) => key("stages", stage, field));
}

function metric(name, stage) {
  return metricKeys(name, stage).reduce((sum, path) => sum + at(data, path), 0);
}

// The head: what changed in all, a number at a time --------------------------------------------------------------------

function fillHead() {
  const what = data.conditions;
  $("model").textContent = data.model;
  const call = [what.training ? "training" : "evaluation"];
  if (what.checkpointing) call.push("checkpointing");
  if (what.batch_size !== null) call.push(`${what.batch_size} × ${what.sequence_length} tokens`);
  $("call").replaceChildren(
    `policy ${data.policy}, `, shown(data, ["conditions.num_parameters"], "count"), " parameters in ",
    shown(data, ["conditions.parameter_bytes"], "bytes"), `; ${call.join(", ")}`);
  $("graph").replaceChildren(...data.graphs.map((one, index) =>
    element("option", { value: index }, `graph ${index}: ${one.stages[0].num_nodes} operations`)));
  $("graph").value = view.graph;
  $("graph").hidden = data.graphs.length < 2;
  const last = graph.stages.length - 1;
  $("cards").replaceChildren(...Object.entries(METRICS).filter(([name]) => name === "nodes" || measured()).map(([name, [title, , format]]) => {
    const before = metric(name, 0), after = metric(name, last);
    const change = element("span", { class: `less ${after < before ? "better" : after > before ? "worse" : ""}` }, percent(before, after));
    change.dataset.change = `${metricKeys(name, 0).join("+")}|${metricKeys(name, last).join("+")}`;
    return element("button", {
      class: "card", role: "radio", "aria-checked": view.metric === name, "data-metric": name,
      onclick: () => { view.metric = name; fillHead(); fillPasses(); if (!view.chosen) fillDetails(); },
    }, element("b", {}, title), change, element("div", { class: "pair" },
      shown(data, metricKeys(name, 0), format), " → ", shown(data, metricKeys(name, last), format)));
  }));
}

// The left: passes, rewrites, what was left alone -----------------------------------------------------------------------

function fillPasses() {
  const name = view.metric === "nodes" || measured() ? view.metric : "nodes";
  const most = Math.max(1, ...graph.stages.map((_, index) => metric(name, index)));
  $("passes").replaceChildren(...graph.stages.flatMap((stage, index) => {
    if (index === 0) return [];
    const color = colorOf(stage.name);
    const box = element("input", { type: "checkbox", "aria-label": `show ${stage.name}`, onchange: () => {
      if (box.checked) view.hidden.delete(stage.name); else view.hidden.add(stage.name);
      fillList(); redraw();
    } });
    box.checked = !view.hidden.has(stage.name);
    box.disabled = !stage.num_rewrites;
    const chart = shape("svg", { viewBox: "0 0 62 12", "aria-hidden": true });
    chart.append(shape("rect", { x: 0, y: 3, width: (62 * metric(name, index)) / most, height: 6, rx: 2, class: "keeps", fill: "currentColor", opacity: 0.35 }));
    const count = stage.num_rewrites ? shown(data, [key("stages", index, "num_rewrites")], "plain") : "";
    const label = element("label", { class: `pass ${color} ${stage.num_rewrites ? "" : "idle"}`, "data-step": stage.name },
      box, element("span", { class: "name" }, stage.name), element("span", { class: "number" }, count), chart);
    label.title = `${METRICS[name][0]} after it: ${FORMATS[METRICS[name][2]](metric(name, index))}`;
    return [label];
  }));
}

function matches(...texts) {
  const query = view.query.toLowerCase();
  return !query || texts.some((text) => (text ?? "").toLowerCase().includes(query));
}

function hunkMatches(hunk) {
  if (hunk.steps.every((step) => view.hidden.has(step) || !stepsWithRewrites().includes(step))) return false;
  const source = sourceOf(hunk);
  const nodes = [...hunk.removed, ...hunk.added].map((id) => graph.nodes[id]);
  return matches(titleOf(hunk), hunk.module, source?.file, source?.code, source?.function,
    ...hunk.rewrites.map((id) => graph.rewrites[id].rule), ...nodes.flatMap((node) => [node.operation, node.name]));
}

function visibleHunks() {
  return rewritten().map((hunks) => hunks.filter(hunkMatches)).filter((hunks) => hunks.length);
}

function visibleMisses() {
  const groups = new Map();
  graph.misses.forEach((miss, index) => {
    if (!matches(miss.rule, miss.reason, miss.module, miss.source)) return;
    const like = JSON.stringify([miss.rule, miss.reason, miss.source, miss.refused]);
    if (!groups.has(like)) groups.set(like, []);
    groups.get(like).push(index);
  });
  return [...groups.values()];
}

function fillList() {
  const hunks = visibleHunks(), misses = visibleMisses();
  for (const tab of ["rewrites", "misses"]) $(`tab-${tab}`).setAttribute("aria-selected", view.tab === tab);
  $("tab-rewrites").textContent = `rewrites ${hunks.reduce((sum, group) => sum + group.length, 0)}`;
  $("tab-misses").textContent = `left alone ${misses.reduce((sum, group) => sum + group.length, 0)}`;
  const items = view.tab === "rewrites" ? hunks.map(hunkItem) : misses.map(missItem);
  const nothing = view.tab === "rewrites" ? "no rewrite is shown" : "nothing was nearly rewritten, and no proof failed";
  $("list").replaceChildren(...(items.length ? items : [element("p", { class: "empty" }, nothing)]));
}

function hunkItem(hunks) {
  const hunk = hunks[0], source = sourceOf(hunk);
  const current = view.chosen?.kind === "hunk" && graph.hunks[view.chosen.index].like === hunk.like;
  return element("button", {
    class: `item ${colorOf(stepOf(hunk))}`, "aria-current": current, "data-hunk": hunk.index, onclick: () => choose("hunk", hunk.index, true),
  }, element("div", { class: "top" }, element("span", {}, titleOf(hunk)), element("span", { class: "times" }, `× ${hunks.length}`)),
  element("div", { class: "under" }, source ? `${source.function}, ${source.file.split("/").at(-1)}:${source.line}` : hunk.module || "the call"));
}

function missItem(indices) {
  const miss = graph.misses[indices[0]];
  const current = view.chosen?.kind === "miss" && indices.includes(view.chosen.index);
  return element("button", { class: "item", "aria-current": current, "data-miss": indices[0], onclick: () => choose("miss", indices[0], true) },
    element("div", { class: "top" }, element("span", {}, miss.rule), element("span", { class: "times" }, `× ${indices.length}`)),
    element("div", { class: "reason" }, `${miss.refused ? "refused by the proof: " : ""}${miss.reason}`),
    element("div", { class: "under" }, miss.source));
}

// The right: what is chosen -----------------------------------------------------------------------------------------------

function fillDetails() {
  const chosen = view.chosen;
  const parts = chosen === null ? overview() : { hunk: hunkDetails, node: nodeDetails, miss: missDetails }[chosen.kind](chosen.index);
  $("details").replaceChildren(...parts);
  $("right").scrollTop = 0;
}

function overview() {
  const name = view.metric === "nodes" || measured() ? view.metric : "nodes";
  const [title, , format] = METRICS[name];
  const most = Math.max(1, ...graph.stages.map((_, index) => metric(name, index))), step = 360 / graph.stages.length;
  const chart = shape("svg", { class: "chart", viewBox: "0 0 360 96", role: "img", "aria-label": `${title}, pass by pass` });
  graph.stages.forEach((stage, index) => {
    const height = (90 * metric(name, index)) / most;
    const bar = shape("rect", { x: index * step + 1, y: 96 - height, width: step - 3, height, rx: 2, class: index ? colorOf(stage.name) || "first" : "first" });
    bar.append(shape("title", {}, `${stage.name}: ${FORMATS[format](metric(name, index))}`));
    chart.append(bar);
  });
  const rows = graph.stages.map((stage, index) => element("tr", {},
    element("td", {}, stage.name), element("td", {}, stage.num_rewrites ? shown(data, [key("stages", index, "num_rewrites")], "plain") : ""),
    element("td", {}, shown(data, metricKeys(name, index), format))));
  const notes = [];
  if (graph.not_measured) notes.push(element("p", { class: "note" }, `Costs are not known: ${graph.not_measured}`));
  for (const [reason, count] of Object.entries(data.graph_breaks)) notes.push(element("p", { class: "note" }, `graph break × ${count}: ${reason}`));
  for (const [reason, count] of Object.entries(data.fallbacks)) notes.push(element("p", { class: "note" }, `fell back × ${count}: ${reason}`));
  const last = graph.stages.at(-1);
  const peak = measured() ? [element("p", { class: "under" }, `The peak is at ${last.peak_at}, and was at ${graph.stages[0].peak_at}.`)] : [];
  return [element("h3", {}, title), element("p", { class: "under" }, "as it was captured, and after each pass"), chart,
    element("table", {}, element("tr", {}, element("th", {}, "pass"), element("th", {}, "rewrites"), element("th", {}, title)), ...rows),
    ...peak, ...notes, element("h2", {}, "made with"),
    element("p", { class: "under" }, Object.entries(data.conditions.versions).map((pair) => pair.join(" ")).join(", "))];
}

function hunkDetails(index) {
  const hunk = graph.hunks[index], source = sourceOf(hunk), like = graph.hunks.filter((one) => one.like === hunk.like);
  const removed = hunk.removed.map((id) => graph.nodes[id]), added = hunk.added.map((id) => graph.nodes[id]);
  const parts = [
    element("h3", {}, titleOf(hunk)),
    element("p", { class: "under" }, hunk.steps.join(", ")),
    element("p", { class: "under" }, source ? `${source.file}:${source.line} in ${source.function}` : "no source line"),
    element("h2", {}, "source"), codeOf(removed, added),
  ];
  if (hunk.before && hunk.after) parts.push(element("h2", {}, "cost of one training step"), costTable(["hunks", index], "before", "after"));
  const proofs = hunk.rewrites.map((id) => [id, graph.rewrites[id]]);
  parts.push(element("h2", {}, "proof: largest error against float64"), element("table", {},
    element("tr", {}, ...["rule", "was", "is", "inputs"].map((text) => element("th", {}, text))),
    ...proofs.map(([id, rewrite]) => element("tr", {}, element("td", { class: "wide" }, rewrite.rule), ...(rewrite.proof === null
      ? [element("td", { colspan: 3 }, "by computation, not by samples")]
      : [["original_error", "error"], ["replacement_error", "error"], ["num_inputs", "plain"]].map(([field, format]) =>
        element("td", {}, shown(data, [key("rewrites", id, "proof", field)], format))))))));
  parts.push(element("h2", {}, `operations: ${removed.length} → ${added.length}`), nodeTable(removed, "−"), nodeTable(added, "+"));
  parts.push(element("h2", {}, `where: ${like.length} ${like.length === 1 ? "place" : "places"}`), element("div", { class: "chips" },
    ...like.map((one) => element("button", { onclick: () => choose("hunk", one.index, true), "aria-current": one.index === index }, one.module || "the call"))));
  return parts;
}

function codeOf(removed, added) {
  const lines = new Map();
  for (const node of removed) {
    const source = sourceOf(node), place = source ? node.source : node.spelled;
    if (!lines.has(place)) lines.set(place, source ? [source.line, source.code] : ["", node.spelled]);
  }
  const line = (kind, sign, number, code) => element("div", { class: kind },
    element("span", {}, sign), element("span", { class: "number" }, String(number)), element("span", {}, code));
  return element("div", { class: "code" }, ...[...lines.values()].map(([number, code]) => line("minus", "−", number, code)),
    ...added.filter((node) => node.operation !== "getitem").map((node) => line("plus", "+", "", `${node.operation}(${node.arguments})`)));
}

const COSTS = [
  ["kernel launches", ["launches", "backward_launches"], "plain"], ["casts run", ["casts"], "plain"],
  ["bytes moved", ["bytes_moved", "backward_bytes_moved"], "bytes"], ["arithmetic", ["flops", "backward_flops"], "flops"],
  ["saved for backward", ["saved_bytes"], "bytes"],
];

function costTable(path, ...sides) {
  const keys = (fields, side) => fields.map((field) => key(...path, side, field));
  return element("table", {}, element("tr", {}, element("th", {}, ""), ...sides.map((side) => element("th", {}, side))),
    ...COSTS.map(([title, fields, format]) => element("tr", {}, element("td", {}, title),
      ...sides.map((side) => element("td", {}, shown(data, keys(fields, side), format))))));
}

function nodeTable(nodes, sign) {
  return element("table", {}, ...nodes.map((node) => element("tr", {}, element("td", {}, sign),
    element("td", { class: "wide mono" }, element("button", { class: "mono", onclick: () => choose("node", node.id, false) }, sign === "−" ? node.spelled : node.operation)),
    element("td", { class: "mono value" }, valueOf(node)), element("td", {}, shown(data, [key("nodes", node.id, "size_bytes")], "bytes")))));
}

function nodeDetails(index) {
  const node = graph.nodes[index], source = sourceOf(node), sides = ["before", "after"].filter((side) => node[side] !== null);
  const origin = (one) => `${one.step}${one.rule ? `, ${one.rule}` : ""}`;
  const facts = [["result", valueOf(node)], ["arguments", node.arguments], ["module", node.module || "the call"], ["name", node.name]];
  if (node.graph) facts.push(["inside", node.graph]);
  if (node.spelled !== node.operation) facts.push(["written as", node.spelled]);
  if (node.made_by) facts.push(["made by", origin(node.made_by)]);
  if (node.removed_by) facts.push(["removed by", origin(node.removed_by)]);
  const hunk = hunkOf(index);
  return [element("h3", {}, node.operation), element("p", { class: "under" }, source ? `${source.file}:${source.line} in ${source.function}` : "no source line"),
    ...(source ? [element("div", { class: "code" }, element("div", {}, element("span", {}, ""), element("span", { class: "number" }, String(source.line)), element("span", {}, source.code)))] : []),
    element("h2", {}, "what it is"), element("table", {}, ...facts.map(([name, text]) => element("tr", {}, element("td", {}, name), element("td", { class: "wide mono" }, text))),
      element("tr", {}, element("td", {}, "size"), element("td", { class: "wide" }, shown(data, [key("nodes", index, "size_bytes")], "bytes")))),
    ...(sides.length ? [element("h2", {}, "cost of one training step"), costTable(["nodes", index], ...sides)] : []),
    ...(hunk?.rewrites.length ? [element("h2", {}, "part of"), element("button", { onclick: () => choose("hunk", hunk.index, false) }, titleOf(hunk))] : [])];
}

function missDetails(index) {
  const miss = graph.misses[index];
  return [element("h3", {}, miss.rule), element("p", { class: "under" }, `${miss.refused ? "refused by the proof" : "nearly matched"}, in ${miss.step}`),
    element("p", { class: "note" }, miss.reason), element("h2", {}, "where"), element("p", { class: "mono" }, miss.source), element("p", { class: "under" }, miss.module),
    ...(miss.node === null ? [] : [element("h2", {}, "operation"), nodeTable([graph.nodes[miss.node]], "−")])];
}

let hunkByNode = new Map();
const hunkOf = (id) => hunkByNode.get(id);

// Choosing -----------------------------------------------------------------------------------------------------------------

function choose(kind, index, reveal) {
  view.chosen = kind === null ? null : { kind, index };
  if (kind !== null && reveal) show(kind === "hunk" ? graph.hunks[index].removed[0] ?? graph.hunks[index].added[0] : kind === "miss" ? graph.misses[index].node : index);
  fillList();
  fillDetails();
  redraw();
  document.querySelector('.item[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
}

// Open the layer that a node stands in, or the one that stands for it, and bring the node into sight.
function show(id) {
  if (id === null || id === undefined) return;
  let block = graph.blocks.find((one) => one.nodes.includes(id));
  let target = id;
  if (!view.unfolded && block.like !== block.index) {
    target = graph.blocks[block.like].nodes[block.nodes.indexOf(id)];
    block = graph.blocks[block.like];
  }
  view.open.add(block.index);
  layout = rowsOf(graph, view, hunkByNode);
  const row = layout.rows.find((one) => one.left === target || one.right === target);
  if (!row) return;
  const { height } = $("canvas").getBoundingClientRect();
  const top = row.y * view.zoom + view.y;
  if (top < 40 || top > height - 120) view.y = height / 3 - row.y * view.zoom;
}

function step(direction) {
  const groups = visibleHunks().map((hunks) => hunks[0]);
  if (!groups.length) return;
  const now = view.chosen?.kind === "hunk" ? groups.findIndex((hunk) => hunk.like === graph.hunks[view.chosen.index].like) : -1;
  const next = now < 0 ? (direction > 0 ? 0 : groups.length - 1) : (now + direction + groups.length) % groups.length;
  view.tab = "rewrites";
  choose("hunk", groups[next].index, true);
}

// The graph: only the rows in sight are in the document --------------------------------------------------------------------

function redraw() {
  layout = rowsOf(graph, view, hunkByNode);
  drawn = null;
  draw();
}

let asked = false;
function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; paint(); });
}

function paint() {
  const { width, height } = $("canvas").getBoundingClientRect();
  const content = Math.max(layout.height * view.zoom, 1);
  view.y = Math.min(40, Math.max(view.y, Math.min(40, height - content - 40)));
  view.x = Math.min(width - 80, Math.max(view.x, 80 - TOTAL * view.zoom));
  const top = -view.y / view.zoom, bottom = top + height / view.zoom, coarse = view.zoom < 0.45;
  if (!drawn || top < drawn.top || bottom > drawn.bottom || coarse !== drawn.coarse) {
    const spare = (bottom - top) / 2;
    drawn = { top: top - spare, bottom: bottom + spare, coarse };
    $("canvas").replaceChildren(contents(drawn));
  }
  $("canvas").firstChild.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.zoom})`);
}

function contents({ top, bottom, coarse }) {
  const whole = shape("g"), rows = layout.rows.filter((row) => row.y + row.height > top && row.y < bottom);
  const place = new Map();
  for (const row of layout.rows) {
    if (row.kind !== "node") continue;
    if (row.left !== null) place.set(`l${row.left}`, row.y + ROW / 2);
    if (row.right !== null) place.set(`r${row.right}`, row.y + ROW / 2);
  }
  if (!coarse) for (const wire of wires(rows, place)) whole.append(wire);
  if (!view.overlaid) for (const band of bands(place, top, bottom)) whole.append(band);
  for (const row of rows) {
    if (row.kind === "head") whole.append(head(row, coarse));
    else if (row.kind === "module") { if (!coarse) whole.append(shape("text", { x: LEFT_X, y: row.y + MODULE / 2 + 2, class: "module" }, short(row.text || "the call", 60))); }
    else for (const side of ["left", "right"]) if (row[side] !== null) whole.append(cell(row, side, coarse));
  }
  return whole;
}

function head(row, coarse) {
  const width = view.overlaid ? WIDTH : RIGHT_X + WIDTH - LEFT_X, open = view.open.has(row.block.index);
  const group = shape("g", { class: "head", tabindex: 0, role: "button", "aria-expanded": open, "data-block": row.block.index });
  const counted = (kinds) => row.block.nodes.filter((id) => kinds.includes(kindOf(graph.nodes[id]))).length;
  const name = row.block.path || "the call", times = row.group.length > 1 ? `  × ${row.group.length}` : "";
  const y = row.y + HEAD / 2;
  group.append(shape("rect", { x: LEFT_X - 8, y: row.y, width: width + 16, height: HEAD - 2, rx: 7, class: "header" }));
  group.append(shape("text", { x: LEFT_X + 6, y }, `${open ? "▾" : "▸"}  ${short(name, view.overlaid ? 26 : 52)}${times}`));
  if (!coarse) {
    const saved = (side) => row.block.nodes.reduce((sum, id) => sum + (graph.nodes[id][side]?.saved_bytes ?? 0), 0);
    const before = counted(["stays", "gone"]), after = counted(["stays", "came"]);
    const keeps = measured() && !view.overlaid ? ` · keeps ${FORMATS.bytes(saved("before"))} → ${FORMATS.bytes(saved("after"))}` : "";
    group.append(shape("text", { x: LEFT_X + width - 6, y, class: "dim", "text-anchor": "end" }, `${before} → ${after} operations${keeps}`));
  }
  const toggle = () => { if (open) view.open.delete(row.block.index); else view.open.add(row.block.index); redraw(); };
  group.addEventListener("click", toggle);
  group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); toggle(); } });
  return group;
}

function cell(row, side, coarse) {
  const id = row[side], node = graph.nodes[id], x = side === "left" ? LEFT_X : RIGHT_X, kind = kindOf(node);
  const hunk = hunkOf(id), chosen = view.chosen && ((view.chosen.kind === "node" && view.chosen.index === id)
    || (view.chosen.kind === "hunk" && hunk && graph.hunks[view.chosen.index].like === hunk.like && sameBlockShown(hunk)));
  const hidden = (hunk?.rewrites.length && view.hidden.has(stepOf(hunk)))
    || !matches(node.operation, node.spelled, node.module, node.name, sourceOf(node)?.code, sourceOf(node)?.file);
  const group = shape("g", { class: `cell ${chosen ? "chosen" : ""} ${hidden ? "faded" : ""}`, "data-node": id });
  group.append(shape("rect", { x, y: row.y + 1, width: WIDTH, height: ROW - 3, rx: 4, class: kind === "stays" ? (hunk?.rewrites.length ? (side === "left" && !view.overlaid ? "gone" : "came") : "node") : kind }));
  const cost = side === "left" && kind !== "came" ? node.before : node.after;
  if (cost?.saved_bytes) group.append(shape("rect", { x: x + 2, y: row.y + ROW - 5, width: Math.max(2, (WIDTH - 4) * Math.sqrt(cost.saved_bytes / largestSaved)), height: 2.5, class: "keeps" }));
  if (!coarse) {
    const name = side === "left" && kind !== "came" ? node.spelled : node.operation;
    const value = short(valueOf(node), 32);
    group.append(shape("text", { x: x + 9, y: row.y + ROW / 2 - 1 }, short(name, 48 - value.length)));
    group.append(shape("text", { x: x + WIDTH - 9, y: row.y + ROW / 2 - 1, class: "dim", "text-anchor": "end" }, value));
  }
  group.addEventListener("click", () => (hunk?.rewrites.length ? choose("hunk", hunk.index, false) : choose("node", id, false)));
  return group;
}

// Of equal layers, only the one that is chosen is marked, or the one that stands for it.
function sameBlockShown(hunk) {
  return !view.unfolded || hunk.index === view.chosen.index;
}

// From what went to what came in its place.
function bands(place, top, bottom) {
  const found = [];
  for (const hunk of graph.hunks) {
    if (!hunk.rewrites.length || view.hidden.has(stepOf(hunk))) continue;
    const left = hunk.removed.map((id) => place.get(`l${id}`)).filter((y) => y !== undefined);
    const right = hunk.added.map((id) => place.get(`r${id}`)).filter((y) => y !== undefined);
    if (!left.length || !right.length) continue;
    const [a, b, c, d] = [Math.min(...left) - ROW / 2 + 1, Math.max(...left) + ROW / 2 - 2, Math.min(...right) - ROW / 2 + 1, Math.max(...right) + ROW / 2 - 2];
    if (Math.max(b, d) < top || Math.min(a, c) > bottom) continue;
    const x1 = LEFT_X + WIDTH, x2 = RIGHT_X, m = (x1 + x2) / 2;
    const chosen = view.chosen?.kind === "hunk" && view.chosen.index === hunk.index;
    const band = shape("path", {
      d: `M${x1} ${a} C${m} ${a} ${m} ${c} ${x2} ${c} V${d} C${m} ${d} ${m} ${b} ${x1} ${b} Z`,
      class: `band ${colorOf(stepOf(hunk))} ${chosen ? "chosen" : ""}`, "data-hunk": hunk.index,
    });
    band.append(shape("title", {}, `${titleOf(hunk)} (${hunk.steps.join(", ")})`));
    band.addEventListener("click", () => choose("hunk", hunk.index, false));
    found.push(band);
  }
  return found;
}

// Who reads what, as arcs outside the columns; faint, but for the chosen node's.
function wires(rows, place) {
  const found = [], chosen = view.chosen?.kind === "node" ? view.chosen.index : null, last = graph.stages.length - 1;
  const inSight = new Set(rows.flatMap((row) => (row.kind === "node" ? [row.left, row.right] : [])));
  for (const [side, stage, edge, direction] of [["l", 0, LEFT_X, -1], ["r", last, RIGHT_X + WIDTH, 1]]) {
    for (const id of inSight) {
      if (id === null) continue;
      const to = place.get(side + id);
      if (to === undefined) continue;
      for (const source of readsAt(graph.nodes[id], stage)) {
        const from = place.get(side + source);
        if (from === undefined) continue;
        const reach = edge + direction * Math.min(66, 8 + Math.abs(to - from) / 6);
        const marked = id === chosen || source === chosen;
        found.push(shape("path", { d: `M${edge} ${from} C${reach} ${from} ${reach} ${to} ${edge} ${to}`, class: `wire ${marked ? "chosen" : ""}` }));
      }
    }
  }
  return found;
}

function readsAt(node, stage) {
  let nodes = [];
  for (const [since, reads] of node.reads) if (since <= stage) nodes = reads;
  return nodes;
}

// Moving -----------------------------------------------------------------------------------------------------------------

function zoomBy(factor, x = null, y = null) {
  const { width, height } = $("canvas").getBoundingClientRect();
  const [px, py] = [x ?? width / 2, y ?? height / 2];
  const zoom = Math.min(3, Math.max(0.08, view.zoom * factor));
  view.x = px - ((px - view.x) * zoom) / view.zoom;
  view.y = py - ((py - view.y) * zoom) / view.zoom;
  view.zoom = zoom;
  draw();
}

function home() {
  const { width } = $("canvas").getBoundingClientRect();
  const content = view.overlaid ? LEFT_X + WIDTH + MARGIN : TOTAL;
  view.zoom = Math.min(1, width / content);
  view.x = Math.max(0, (width - content * view.zoom) / 2);
  view.y = 14;
  draw();
}

function listenToCanvas() {
  const canvas = $("canvas");
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    if (event.ctrlKey || event.metaKey) zoomBy(Math.exp(-event.deltaY / 240), event.clientX - box.left, event.clientY - box.top);
    else { view.x -= event.shiftKey ? event.deltaY : event.deltaX; view.y -= event.shiftKey ? 0 : event.deltaY; draw(); }
  }, { passive: false });
  let from = null;
  canvas.addEventListener("pointerdown", (event) => { from = { x: event.clientX - view.x, y: event.clientY - view.y, moved: false, id: event.pointerId }; });
  canvas.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [x, y] = [event.clientX - from.x, event.clientY - from.y];
    if (!from.moved && Math.hypot(x - view.x, y - view.y) < 4) return;
    if (!from.moved) { from.moved = true; canvas.setPointerCapture(from.id); canvas.classList.add("dragging"); }
    view.x = x; view.y = y;
    draw();
  });
  canvas.addEventListener("pointerup", () => { from = null; canvas.classList.remove("dragging"); });
  canvas.addEventListener("pointercancel", () => { from = null; canvas.classList.remove("dragging"); });
}

// Commands ---------------------------------------------------------------------------------------------------------------

function unfold() {
  view.unfolded = !view.unfolded;
  $("unfold").textContent = view.unfolded ? "fold layers" : "unfold layers";
  redraw();
}

function overlay() {
  view.overlaid = !view.overlaid;
  $("mode").textContent = view.overlaid ? "side by side" : "overlay";
  redraw();
  home();
}

function openAll() {
  const heads = layout.rows.filter((row) => row.kind === "head").map((row) => row.block.index);
  const all = heads.every((index) => view.open.has(index));
  for (const index of heads) if (all) view.open.delete(index); else view.open.add(index);
  redraw();
}

function theme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (document.documentElement.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}

const KEYS = {
  j: () => step(1), k: () => step(-1), f: unfold, e: openAll, o: overlay, t: theme, 0: home,
  "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), "?": () => $("keys").showModal(),
  "/": () => $("search").focus(), Escape: () => choose(null),
  ArrowDown: () => move(0, -60), ArrowUp: () => move(0, 60), ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0),
  PageDown: () => move(0, -500), PageUp: () => move(0, 500),
};

function move(x, y) { view.x += x; view.y += y; draw(); }

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input[type=search], select") && event.key !== "Escape") return;
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open || !Object.hasOwn(KEYS, event.key)) return;
    if (event.key.startsWith("Arrow") && event.target.closest("aside")) return; // lists scroll by themselves
    event.preventDefault();
    if (event.key === "Escape") event.target.blur();
    KEYS[event.key]();
  });
}

// -----------------------------------------------------------------------------------------------------------------------

let largestSaved = 1;

function choosesGraph(index) {
  view.graph = index;
  graph = data.graphs[index];
  view.chosen = null;
  view.hidden.clear();
  if (!measured()) view.metric = "nodes";
  hunkByNode = new Map(graph.hunks.flatMap((hunk) => [...hunk.removed, ...hunk.added].map((id) => [id, hunk])));
  largestSaved = Math.max(1, ...graph.nodes.flatMap((node) => [node.before?.saved_bytes ?? 0, node.after?.saved_bytes ?? 0]));
  // The layer that stands for most is open at the start: it is what there is to look at.
  const most = folded(graph.blocks).reduce((best, group) => (group.length > best.length ? group : best), []);
  view.open = new Set(most.length ? [most[0].index] : []);
  fillHead(); fillPasses(); fillList(); fillDetails(); redraw(); home();
}

function start() {
  if (!data.graphs.length) {
    $("model").textContent = data.model;
    $("details").append(element("p", { class: "note" }, `No graph was captured. ${Object.keys(data.fallbacks).join("; ")}`));
    return;
  }
  $("graph").addEventListener("change", () => choosesGraph(Number($("graph").value)));
  for (const [id, command] of [["mode", overlay], ["theme", theme], ["unfold", unfold], ["fit", home]]) $(id).addEventListener("click", command);
  $("in").addEventListener("click", () => zoomBy(1.25));
  $("out").addEventListener("click", () => zoomBy(0.8));
  $("help").addEventListener("click", () => $("keys").showModal());
  $("search").addEventListener("input", () => { view.query = $("search").value.trim(); fillList(); redraw(); });
  for (const tab of ["rewrites", "misses"]) $(`tab-${tab}`).addEventListener("click", () => { view.tab = tab; fillList(); });
  listenToCanvas();
  listenToKeys();
  addEventListener("resize", () => { drawn = null; draw(); });
  choosesGraph(0);
}

start();
