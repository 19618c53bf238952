"use strict";

// Where everything stands: rows of two cells, before and after, under a header for each layer.

const ROW = 24, HEAD = 34, MODULE = 20, GAP = 8;
const LETTER = 7.25, BOLD_LETTER = 7.8, SMALL_LETTER = 6.4; // how wide the drawing's fonts are, or a little more

// Where the two cells of a row stand, in as much space as the drawing has; in one column where it is overlaid.
const columns = { margin: 74, width: 380, left: 74, right: 574, total: 1028 };

function fitColumns(space, overlaid) {
  const between = (least, value, most) => Math.max(least, Math.min(value, most));
  if (overlaid) {
    columns.margin = between(20, (space - 380) / 2, 74);
    columns.width = between(260, space - 2 * columns.margin, 380);
    columns.left = columns.right = columns.margin;
  } else {
    const roomy = between(0, (space - 640) / 388, 1), middle = 64 + 56 * roomy;
    columns.margin = 40 + 34 * roomy;
    columns.width = between(304, (space - 2 * columns.margin - middle) / 2, 380); // narrower, names would be cut
    columns.left = columns.margin;
    columns.right = columns.margin + columns.width + middle;
  }
  columns.total = columns.right + columns.width + columns.margin;
}

function kindOf(node) {
  if (node.made === 0) return node.removed === null ? "stays" : "gone";
  return node.removed === null ? "came" : "passing"; // made by one pass and taken by a later one
}

// Blocks that are equal, together, in the order of the first of each.
function folded(items) {
  const groups = new Map();
  for (const item of items) {
    if (!groups.has(item.like)) groups.set(item.like, []);
    groups.get(item.like).push(item);
  }
  return [...groups.values()];
}

function rowsOf(graph, view, hunkByNode) {
  const rows = [];
  let y = 0;
  const add = (row, height) => { rows.push({ ...row, y, height }); y += height; };
  for (const blocks of folded(graph.blocks)) {
    if (!blocks.some((block) => block.nodes.some((id) => kindOf(graph.nodes[id]) !== "passing"))) continue;
    const split = view.unfolded || blocks.length === 1;
    for (const group of split ? blocks.map((block) => [block]) : [blocks]) {
      add({ kind: "head", block: group[0], group }, HEAD);
      if (view.open.has(group[0].index)) {
        for (const row of nodeRows(graph, group[0], view.overlaid, hunkByNode)) add(row, row.kind === "module" ? MODULE : ROW);
      }
      y += GAP;
    }
  }
  return { rows, height: y };
}

// The nodes of a layer, in order; what went stands beside what came.
function nodeRows(graph, block, overlaid, hunkByNode) {
  const rows = [];
  let gone = [], came = [], module = null;
  const flush = () => {
    if (overlaid) for (const id of after(gone, came, hunkByNode)) rows.push({ kind: "node", left: id, right: null, block });
    else {
      const right = beside(gone, came, hunkByNode);
      for (let i = 0; i < Math.max(gone.length, right.length); i += 1) {
        rows.push({ kind: "node", left: gone[i] ?? null, right: right[i] ?? null, block });
      }
    }
    gone = []; came = [];
  };
  for (const id of block.nodes) {
    const node = graph.nodes[id], kind = kindOf(node);
    if (kind === "passing") continue;
    if (node.module !== module && kind !== "came") {
      flush();
      module = node.module;
      rows.push({ kind: "module", text: module, block });
    }
    if (kind === "gone") gone.push(id);
    else if (kind === "came") came.push(id);
    else { flush(); rows.push({ kind: "node", left: id, right: overlaid ? null : id, block }); }
  }
  flush();
  return rows;
}

// What came, each beside the first that went for it, and never above what came before.
function beside(gone, came, hunkByNode) {
  const right = [];
  for (const id of came) {
    const first = gone.findIndex((other) => hunkByNode.get(other) === hunkByNode.get(id));
    while (right.length < first) right.push(null);
    right.push(id);
  }
  return right;
}

// What came, each after the last that went for it.
function after(gone, came, hunkByNode) {
  const left = new Set(came);
  const ordered = gone.flatMap((id, index) => {
    const hunk = hunkByNode.get(id);
    if (gone.slice(index + 1).some((other) => hunkByNode.get(other) === hunk)) return [id];
    const followers = came.filter((other) => left.has(other) && hunk && hunkByNode.get(other) === hunk);
    followers.forEach((other) => left.delete(other));
    return [id, ...followers];
  });
  return [...ordered, ...left];
}
