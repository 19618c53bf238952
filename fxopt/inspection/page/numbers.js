"use strict";

// Numbers as people read them: the same as fxopt/inspection/numbers.py.

function scaled(number, units) {
  let size = Math.abs(number), index = 0;
  while (size >= 999.5 && index < units.length - 1) { size /= 1000; index += 1; }
  const digits = index === 0 || size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
  return `${number < 0 ? "-" : ""}${size.toFixed(digits)} ${units[index]}`.trimEnd();
}

const FORMATS = {
  bytes: (n) => scaled(n, ["B", "kB", "MB", "GB", "TB", "PB"]),
  flops: (n) => scaled(n, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"]),
  count: (n) => scaled(n, ["", "k", "M", "G", "T"]),
  plain: (n) => String(n),
  error: (n) => (n === null || Number.isNaN(n) ? "?" : n.toExponential(1)),
};

function percent(before, after) {
  if (before === after) return "=";
  if (before === 0) return "new";
  const change = (100 * (after - before)) / before;
  const digits = Math.abs(change) >= 99 && Math.abs(change) < 100 ? 1 : 0; // −99.5 % is not −100 %
  return `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(digits)} %`;
}

// An element that shows a number of the data. It tells which: `keys` are paths into the data, whose values are added.
function shown(data, keys, format) {
  const value = keys.reduce((sum, key) => sum + at(data, key), 0);
  const span = document.createElement("span");
  span.textContent = FORMATS[format](value);
  span.dataset.keys = keys.join("+");
  span.dataset.format = format;
  return span;
}

function at(data, key) {
  return key.split(".").reduce((value, name) => value[name], data);
}
