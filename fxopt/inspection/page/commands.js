"use strict";

// Commands ---------------------------------------------------------------------------------------------------------------

function unfold() {
  view.unfolded = !view.unfolded;
  $("unfold").textContent = view.unfolded ? "fold layers" : "unfold layers";
  redraw();
}

function overlay() {
  view.overlaid = !view.overlaid;
  view.modeIsChosen = true;
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
  addEventListener("resize", resized);
  // Where panels stand below each other, what is seldom needed does not push the rest away.
  $("pass-panel").open = getComputedStyle(document.querySelector("main")).display === "grid";
  const sizes = data.graphs.map((one) => one.rewrites.length);
  choosesGraph(sizes.indexOf(Math.max(...sizes))); // the one with most to see
}

start();
