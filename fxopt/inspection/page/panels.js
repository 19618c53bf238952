"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

const view = {
  graph: 0, open: new Set(), unfolded: false, overlaid: false, modeIsChosen: false, fitted: true, hidden: new Set(), query: "", tab: "rewrites",
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

// A name that may go on in the next line after each underscore.
const breakable = (name) => name.split(/(?<=_)/).flatMap((part) => [part, element("wbr")]);
const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const key = (...parts) => ["graphs", view.graph, ...parts].join(".");
const sourceOf = (item) => (item.source === null ? null : graph.sources[item.source]);
const valuesOf = (node) => (node.dtype ? [[node.dtype, node.shape]] : node.results).map(([dtype, sizes]) => `${dtype}[${sizes.join(", ")}]`);
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

function costOfOne() {
  if (graph.runs > 1) return "cost of one run of this graph";
  return graph.call.startsWith("evaluation") ? "cost of one evaluation" : "cost of one training step";
}

function metricKeys(name, stage) {
  return METRICS[name][1].map((field) => key("stages", stage, field));
}

function metric(name, stage) {
  return metricKeys(name, stage).reduce((sum, path) => sum + at(data, path), 0);
}

function valueInShort(node) {
  const values = valuesOf(node), alike = values.length > 1 && new Set(values).size === 1;
  return alike ? `${values.length} × ${values[0]}` : values.join(", ");
}

function valueLines(node) {
  return valuesOf(node).map((value) => element("div", {}, value));
}

// The head: what changed in all, a number at a time --------------------------------------------------------------------

function fillHead() {
  const what = data.conditions;
  $("model").textContent = data.model;
  const call = [what.training ? "training" : "evaluation"];  // where no graph tells its own
  if (what.checkpointing) call.push("checkpointing");
  if (what.batch_size !== null) call.push(`${what.batch_size} × ${what.sequence_length} tokens`);
  $("call").replaceChildren(
    `policy ${data.policy}, `, shown(data, ["conditions.num_parameters"], "count"), " parameters in ",
    shown(data, ["conditions.parameter_bytes"], "bytes"), `; ${graph.call || call.join(", ")}`);
  $("graph").replaceChildren(...data.graphs.map((one, index) =>
    element("option", { value: index }, `graph ${index}: ${one.call ? `${one.call}; ` : ""}${one.stages[0].num_nodes} operations, ${one.rewrites.length} rewrites${one.runs > 1 ? `, run ${one.runs} times` : ""}`)));
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

// What a line of source can be found by.
function wordsOf(source) {
  return source ? [`${source.file}:${source.line}`, source.code, source.function] : [];
}

function hunkMatches(hunk) {
  if (hunk.steps.every((step) => view.hidden.has(step) || !stepsWithRewrites().includes(step))) return false;
  const nodes = [...hunk.removed, ...hunk.added].map((id) => graph.nodes[id]);
  return matches(titleOf(hunk), hunk.module, ...wordsOf(sourceOf(hunk)), ...hunk.rewrites.map((id) => graph.rewrites[id].rule),
    ...nodes.flatMap((node) => [node.operation, node.name, ...wordsOf(sourceOf(node))]));
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
  $("tab-rewrites").textContent = `rewrites ${hunks.reduce((sum, group) => sum + rewritesIn(group), 0)}`;
  $("tab-misses").textContent = `left alone ${misses.reduce((sum, group) => sum + group.length, 0)}`;
  const items = view.tab === "rewrites" ? hunks.map(hunkItem) : misses.map(missItem);
  const nothing = view.tab === "rewrites" ? "no rewrite is shown" : "nothing was nearly rewritten, and no proof failed";
  $("list").replaceChildren(...(items.length ? items : [element("p", { class: "empty" }, nothing)]));
}

// Those of equal hunks; one hunk has several where rewrites build on each other.
const rewritesIn = (hunks) => hunks.length * hunks[0].rewrites.length;

function hunkItem(hunks) {
  const hunk = hunks[0], source = sourceOf(hunk), each = hunk.rewrites.length;
  const where = hunks.length === 1 ? "one place" : `${hunks.length} places`;
  const current = view.chosen?.kind === "hunk" && graph.hunks[view.chosen.index].like === hunk.like;
  return element("button", {
    class: `item ${colorOf(stepOf(hunk))}`, "aria-current": current, "data-hunk": hunk.index, onclick: () => choose("hunk", hunk.index, true),
  }, element("div", { class: "top" }, element("span", {}, titleOf(hunk)), element("span", { class: "times" }, `× ${rewritesIn(hunks)}`)),
  element("div", { class: "under" }, source ? `${source.function}, ${placeOf(source)}` : hunk.module || "the call"),
  ...(each > 1 ? [element("div", { class: "each" }, `${each} rewrites in ${hunks.length > 1 ? "each of " : ""}${where}`)] : []));
}

function missItem(indices) {
  const miss = graph.misses[indices[0]];
  const current = view.chosen?.kind === "miss" && indices.includes(view.chosen.index);
  return element("button", { class: "item", "aria-current": current, "data-miss": indices[0], onclick: () => choose("miss", indices[0], true) },
    element("div", { class: "top" }, element("span", {}, miss.rule), element("span", { class: "times" }, `× ${indices.length}`)),
    element("div", { class: "reason" }, `${miss.refused ? "refused by the proof: " : ""}${miss.reason}`),
    element("div", { class: "under" }, miss.source));
}

const placeOf = (source) => `${source.file.split("/").at(-1)}:${source.line}`;

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
  const chart = shape("svg", { class: "chart", viewBox: "0 0 360 96", preserveAspectRatio: "none", role: "img", "aria-label": `${title}, pass by pass` });
  graph.stages.forEach((stage, index) => {
    const height = (90 * metric(name, index)) / most;
    const bar = shape("rect", { x: index * step + 1, y: 96 - height, width: step - 3, height, rx: 2, class: index ? colorOf(stage.name) || "first" : "first" });
    bar.append(shape("title", {}, `${stage.name}: ${FORMATS[format](metric(name, index))}`));
    chart.append(bar);
  });
  const rows = graph.stages.map((stage, index) => element("tr", {},
    element("td", {}, ...breakable(stage.name)), element("td", {}, stage.num_rewrites ? shown(data, [key("stages", index, "num_rewrites")], "plain") : ""),
    element("td", {}, shown(data, metricKeys(name, index), format))));
  const notes = [];
  if (graph.not_measured) notes.push(element("p", { class: "note" }, `Costs are not known: ${graph.not_measured}`));
  for (const [reason, count] of Object.entries(data.graph_breaks)) notes.push(element("p", { class: "note" }, `graph break × ${count}: ${reason}`));
  for (const [reason, count] of Object.entries(data.fallbacks)) notes.push(element("p", { class: "note" }, `fell back × ${count}: ${reason}`));
  const last = graph.stages.at(-1);
  const peak = measured() ? [element("p", { class: "under" }, `The peak is at ${last.peak_at}, and was at ${graph.stages[0].peak_at}.`)] : [];
  return [element("h3", {}, title), element("p", { class: "under" }, "as it was captured, and after each pass"), chart,
    element("table", { class: "by-pass" }, element("tr", {}, element("th", {}, "pass"), element("th", {}, "rewrites"), element("th", {}, title)), ...rows),
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
    element("h2", {}, "source"), codeOf(removed, added, source?.file),
  ];
  if (hunk.before && hunk.after) parts.push(element("h2", {}, costOfOne()), costTable(["hunks", index], "before", "after"));
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

// Lines of another file than `file` say of which.
function codeOf(removed, added, file) {
  const lines = new Map();
  for (const node of removed) {
    const source = sourceOf(node), place = source ? node.source : node.spelled;
    const line = source?.file === file ? [source?.line ?? "", source?.code ?? node.spelled] : ["", source ? `${placeOf(source)}: ${source.code}` : node.spelled];
    if (!lines.has(place)) lines.set(place, line);
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
  return element("table", { class: "nodes" }, ...nodes.map((node) => element("tr", {}, element("td", {}, sign),
    element("td", { class: "wide mono" }, element("div", { class: "apart" },
      element("button", { class: "mono", onclick: () => choose("node", node.id, false) }, sign === "−" ? node.spelled : node.operation),
      element("div", { class: "value" }, ...valueLines(node)))), element("td", {}, shown(data, [key("nodes", node.id, "size_bytes")], "bytes")))));
}

function nodeDetails(index) {
  const node = graph.nodes[index], source = sourceOf(node), sides = ["before", "after"].filter((side) => node[side] !== null);
  const origin = (one) => `${one.step}${one.rule ? `, ${one.rule}` : ""}`;
  const facts = [[node.results.length ? `${node.results.length} results` : "result", ...valueLines(node)], ["arguments", node.arguments], ["module", node.module || "the call"], ["name", node.name]];
  if (node.graph) facts.push(["inside", node.graph]);
  if (node.spelled !== node.operation) facts.push(["written as", node.spelled]);
  if (node.made_by) facts.push(["made by", origin(node.made_by)]);
  if (node.removed_by) facts.push(["removed by", origin(node.removed_by)]);
  const hunk = hunkOf(index);
  return [element("h3", {}, node.operation), element("p", { class: "under" }, source ? `${source.file}:${source.line} in ${source.function}` : "no source line"),
    ...(source ? [element("div", { class: "code" }, element("div", {}, element("span", {}, ""), element("span", { class: "number" }, String(source.line)), element("span", {}, source.code)))] : []),
    element("h2", {}, "what it is"), element("table", {}, ...facts.map(([name, ...text]) => element("tr", {}, element("td", {}, name), element("td", { class: "wide mono" }, ...text))),
      element("tr", {}, element("td", {}, "size"), element("td", { class: "wide" }, shown(data, [key("nodes", index, "size_bytes")], "bytes")))),
    ...(sides.length ? [element("h2", {}, costOfOne()), costTable(["nodes", index], ...sides)] : []),
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
  const top = $("details").getBoundingClientRect().top; // in a window so narrow that it stands below, it may be out of sight
  if (kind !== null && (top < 0 || top > innerHeight / 2) && getComputedStyle(document.querySelector("main")).display !== "grid") $("right").scrollIntoView({ block: "start" });
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
