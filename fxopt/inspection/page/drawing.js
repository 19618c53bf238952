"use strict";

// The graph: only the rows in sight are in the document --------------------------------------------------------------------

// Two columns that are narrower than this are too small to read: they are overlaid until someone asks for two.
const TWO_COLUMNS = 600;

function redraw() {
  const { width } = $("canvas").getBoundingClientRect();
  if (!view.modeIsChosen) view.overlaid = width < TWO_COLUMNS;
  $("mode").textContent = view.overlaid ? "side by side" : "overlay";
  fitColumns(width, view.overlaid);
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
  view.x = Math.min(width - 80, Math.max(view.x, 80 - columns.total * view.zoom));
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
    else if (row.kind === "module") { if (!coarse) whole.append(shape("text", { x: columns.left, y: row.y + MODULE / 2 + 2, class: "module" }, short(row.text || "the call", Math.floor(columns.width / SMALL_LETTER)))); }
    else for (const side of ["left", "right"]) if (row[side] !== null) whole.append(cell(row, side, coarse));
  }
  return whole;
}

function head(row, coarse) {
  const width = view.overlaid ? columns.width : columns.right + columns.width - columns.left, open = view.open.has(row.block.index);
  const group = shape("g", { class: "head", tabindex: 0, role: "button", "aria-expanded": open, "data-block": row.block.index });
  const counted = (kinds) => row.block.nodes.filter((id) => kinds.includes(kindOf(graph.nodes[id]))).length;
  const name = row.block.path || "the call", times = row.group.length > 1 ? `  × ${row.group.length}` : "";
  const y = row.y + HEAD / 2;
  group.append(shape("rect", { x: columns.left - 8, y: row.y, width: width + 16, height: HEAD - 2, rx: 7, class: "header" }));
  let room = width - 20;
  if (!coarse) {
    const saved = (side) => row.block.nodes.reduce((sum, id) => sum + (graph.nodes[id][side]?.saved_bytes ?? 0), 0);
    const before = counted(["stays", "gone"]), after = counted(["stays", "came"]);
    const keeps = measured() && !view.overlaid ? ` · keeps ${FORMATS.bytes(saved("before"))} → ${FORMATS.bytes(saved("after"))}` : "";
    const counts = `${before} → ${after} operations${keeps}`;
    group.append(shape("text", { x: columns.left + width - 6, y, class: "dim", "text-anchor": "end" }, counts));
    room -= counts.length * SMALL_LETTER;
  }
  const letters = Math.max(6, Math.floor(room / BOLD_LETTER) - times.length - 3);
  group.append(shape("text", { x: columns.left + 6, y }, `${open ? "▾" : "▸"}  ${name.length > letters ? `…${name.slice(1 - letters)}` : name}${times}`));
  const toggle = () => { if (open) view.open.delete(row.block.index); else view.open.add(row.block.index); redraw(); };
  group.addEventListener("click", toggle);
  group.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); toggle(); } });
  return group;
}

function cell(row, side, coarse) {
  const id = row[side], node = graph.nodes[id], x = side === "left" ? columns.left : columns.right, kind = kindOf(node);
  const hunk = hunkOf(id), chosen = view.chosen && ((view.chosen.kind === "node" && view.chosen.index === id)
    || (view.chosen.kind === "hunk" && hunk && graph.hunks[view.chosen.index].like === hunk.like && sameBlockShown(hunk)));
  const hidden = (hunk?.rewrites.length && view.hidden.has(stepOf(hunk)))
    || !matches(node.operation, node.spelled, node.module, node.name, ...wordsOf(sourceOf(node)));
  const group = shape("g", { class: `cell ${chosen ? "chosen" : ""} ${hidden ? "faded" : ""}`, "data-node": id });
  group.append(shape("rect", { x, y: row.y + 1, width: columns.width, height: ROW - 3, rx: 4, class: kind === "stays" ? (hunk?.rewrites.length ? (side === "left" && !view.overlaid ? "gone" : "came") : "node") : kind }));
  const cost = side === "left" && kind !== "came" ? node.before : node.after;
  if (cost?.saved_bytes) group.append(shape("rect", { x: x + 2, y: row.y + ROW - 5, width: Math.max(2, (columns.width - 4) * Math.sqrt(cost.saved_bytes / largestSaved)), height: 2.5, class: "keeps" }));
  if (!coarse) {
    const name = side === "left" && kind !== "came" ? node.spelled : node.operation;
    const letters = Math.floor((columns.width - 18) / LETTER) - 1;
    const value = short(valueInShort(node), Math.max(letters - 12, letters - name.length));
    group.append(shape("text", { x: x + 9, y: row.y + ROW / 2 - 1 }, short(name, letters - value.length)));
    group.append(shape("text", { x: x + columns.width - 9, y: row.y + ROW / 2 - 1, class: "dim", "text-anchor": "end" }, value));
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
    if (!hunk.rewrites.length || view.hidden.has(stepOf(hunk)) || !hunkMatches(hunk)) continue;
    const left = hunk.removed.map((id) => place.get(`l${id}`)).filter((y) => y !== undefined);
    const right = hunk.added.map((id) => place.get(`r${id}`)).filter((y) => y !== undefined);
    if (!left.length || !right.length) continue;
    const [a, b, c, d] = [Math.min(...left) - ROW / 2 + 1, Math.max(...left) + ROW / 2 - 2, Math.min(...right) - ROW / 2 + 1, Math.max(...right) + ROW / 2 - 2];
    if (Math.max(b, d) < top || Math.min(a, c) > bottom) continue;
    const x1 = columns.left + columns.width, x2 = columns.right, m = (x1 + x2) / 2;
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
  for (const [side, stage, edge, direction] of [["l", 0, columns.left, -1], ["r", last, columns.right + columns.width, 1]]) {
    for (const id of inSight) {
      if (id === null) continue;
      const to = place.get(side + id);
      if (to === undefined) continue;
      for (const source of readsAt(graph.nodes[id], stage)) {
        const from = place.get(side + source);
        if (from === undefined) continue;
        const reach = edge + direction * Math.min(columns.margin - 8, 8 + Math.abs(to - from) / 6);
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
  view.fitted = false;
  const { width, height } = $("canvas").getBoundingClientRect();
  const [px, py] = [x ?? width / 2, y ?? height / 2];
  const zoom = Math.min(3, Math.max(0.08, view.zoom * factor));
  view.x = px - ((px - view.x) * zoom) / view.zoom;
  view.y = py - ((py - view.y) * zoom) / view.zoom;
  view.zoom = zoom;
  draw();
}

function fit() {
  const { width } = $("canvas").getBoundingClientRect();
  view.zoom = Math.min(1, Math.max(0.75, width / columns.total)); // smaller, it could not be read: it is moved instead
  view.x = Math.max(0, (width - columns.total * view.zoom) / 2);
  view.fitted = true;
  draw();
}

function home() {
  view.y = 14;
  fit();
}

let widthDrawn = 0;
function resized() {
  const { width } = $("canvas").getBoundingClientRect();
  drawn = null;
  if (width === widthDrawn) { draw(); return; } // a phone's address bar came or went
  widthDrawn = width;
  redraw();
  if (view.fitted) fit();
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
