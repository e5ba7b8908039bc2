# SPDX-License-Identifier: Apache-2.0
"""The status page: one document without anything to load, that asks fvdd for what it shows.

Texts from outside (names, paths) are put in as text, never as markup.
"""

from typing import Final

STATUS_PAGE: Final = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>fvd</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 1.5em auto; max-width: 70em;
  padding: 0 1em; }
h1 { font-size: 1.3em; } small, .dim { opacity: .65; font-weight: normal; }
section { border: 1px solid #8886; border-radius: 6px; margin: 1em 0; padding: .6em 1em; }
section h2 { font-size: 1.05em; margin: 0 0 .4em; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11em, 1fr)); gap: .3em 1em;
  margin: 0; }
ul { margin: 0 0 .4em; padding-left: 1.2em; }
dt { opacity: .65; font-size: .85em; } dd { margin: 0; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; } .key { display: inline; width: 1em; height: 1em; }
.strip { height: 18px; margin: .6em 0 .2em; }
.spark { height: 40px; margin-top: .5em; } .bad { color: #c22; font-weight: bold; }
.local { fill: #2a7; } .base { fill: #bbb; } .zero { fill: #acf; } .mixed { fill: #9b7; }
.unknown { fill: #8884; }
polyline { fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.read { stroke: #27c; color: #27c; } .write { stroke: #c62; color: #c62; }
</style></head><body>
<h1>fvd <small id="about">waiting for the daemon</small></h1>
<main id="devices"></main>
<p class="dim" id="legend">
<svg class="key"><rect class="local" width="16" height="16"/></svg> local
<svg class="key"><rect class="mixed" width="16" height="16"/></svg> partly
<svg class="key"><rect class="base" width="16" height="16"/></svg> in the base
<svg class="key"><rect class="zero" width="16" height="16"/></svg> zeros;
<span class="read">&#9473;</span> read, <span class="write">&#9473;</span> written.
This page only shows; it is renewed every two seconds.
Numbers for machines: <a href="metrics">metrics</a>.</p>
<script>
"use strict";
const CELLS = 200, POINTS = 90, SVG = "http://www.w3.org/2000/svg";
const known = new Map();
function make(tag, attributes, parent, text) {
  const made = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4))
    : document.createElement(tag);
  for (const key in attributes || {}) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}
function bytes(n) {
  let unit = 0;
  while (n >= 1024 && unit < 5) { n /= 1024; unit += 1; }
  return (unit && n < 100 ? n.toFixed(1) : Math.round(n)) + " " + ["B", "KiB", "MiB", "GiB", "TiB",
    "PiB"][unit];
}
function span(s) {
  if (s === null) return "-";
  if (s < 60) return Math.round(s) + " s";
  return s < 3600 ? Math.round(s / 60) + " min" : (s / 3600).toFixed(1) + " h";
}
function sum(device, ...names) {
  return names.reduce((total, name) => total + (device.counters[name] || 0), 0);
}
function card(name) {
  const box = make("section", {"data-name": name}, document.getElementById("devices"));
  const it = {box, title: make("h2", {}, box), trouble: make("ul", {}, box),
    list: make("dl", {}, box),
    strip: make("svg:svg", {class: "strip", viewBox: "0 0 " + CELLS + " 1",
      preserveAspectRatio: "none"}, box),
    spark: make("svg:svg", {class: "spark", viewBox: "0 0 " + POINTS + " 100",
      preserveAspectRatio: "none"}, box),
    points: [], last: null, mapped: 0};
  known.set(name, it);
  return it;
}
function show(it, device, clock) {
  const rate = {read: 0, write: 0};
  const reads = (device.durations.read || []).reduce((total, n) => total + n, 0);
  if (it.last && clock > it.last.clock) {
    for (const op in rate) rate[op] = Math.max(0, (sum(device, "io_bytes_" + op)
      - sum(it.last.device, "io_bytes_" + op)) / (clock - it.last.clock));
    it.points.push(rate);
    if (it.points.length > POINTS) it.points.shift();
  }
  it.last = {device, clock};
  it.title.replaceChildren();
  it.title.append(device.name + " ");
  make("small", {}, it.title, (device.device || "") + "  " + device.image);
  const share = device.size_bytes ? device.local_bytes / device.size_bytes : 0;
  const errors = Object.entries(device.counters).filter(([key]) => key.startsWith("io_errors_")
    && !key.endsWith("_einval") && !key.endsWith("_eperm")).reduce((n, [, v]) => n + v, 0);
  const rows = [["state", device.state + (device.reason ? ": " + device.reason : ""),
      device.state !== "attached"],
    ["size", bytes(device.size_bytes)], ["local", (Math.floor(share * 1000) / 10) + " %"],
    ["prefetch", device.prefetch + (device.prefetch === "running"
      ? ", " + bytes(device.prefetch_rate) + "/s" : ""), device.prefetch === "failed"],
    ["all local in", span(device.prefetch_eta)],
    ["read", bytes(rate.read) + "/s"], ["written", bytes(rate.write) + "/s"],
    ["reads without the base", reads
      ? Math.floor(1000 * (reads - device.reads_of_base) / reads) / 10 + " %" : "-"],
    ["journal", device.journal_size_bytes ? Math.round(100 * device.journal_used_bytes
      / device.journal_size_bytes) + " %" : "-"],
    ["oldest request", span(device.oldest_seconds), device.oldest_seconds > 30],
    ["errors", String(errors), device.troubles.some(one => one.word === "ERRORS")],
    ["worker", "restarted " + device.restarts + " times"]];
  if (device.base) rows.push(["base", device.base_up ? "answers" : "cannot be read",
    !device.base_up]);
  it.trouble.replaceChildren();
  for (const one of device.troubles)
    make("li", one.word ? {class: "bad"} : {}, it.trouble, one.topic + ": " + one.text);
  it.list.replaceChildren();
  for (const [term, value, bad] of rows) {
    const pair = make("div", {}, it.list);
    make("dt", {}, pair, term);
    make("dd", bad ? {class: "bad"} : {}, pair, value);
  }
  const top = Math.max(1, ...it.points.map(p => Math.max(p.read, p.write)));
  it.spark.replaceChildren();
  for (const op in rate) make("svg:polyline", {class: op, points: it.points.map((p, x) =>
    x + "," + (98 - 94 * p[op] / top)).join(" ")}, it.spark);
}
async function drawMap(it, name) {
  const answer = await fetch("v1/devices/" + encodeURIComponent(name) + "/map?cells=" + CELLS);
  if (!answer.ok) return;
  const map = await answer.json();
  it.strip.replaceChildren();
  for (let x = 0; x < CELLS; x += 1) {
    const here = ["local", "base", "zero"].filter(kind => map[kind][x]);
    const kind = here.length === 0 ? "unknown" : map.base[x] && here.length > 1 ? "mixed"
      : map.local[x] ? "local" : here[0];
    make("svg:rect", {class: kind, x: x, width: 1.05, height: 1}, it.strip);
  }
  it.strip.setAttribute("data-drawn", "1");
}
async function renew() {
  const about = document.getElementById("about");
  try {
    const state = await (await fetch("v1/activity")).json();
    about.className = "";
    about.textContent = state.version + ", " + state.devices.length + " devices";
    const names = new Set(state.devices.map(device => device.name));
    for (const [name, it] of known) if (!names.has(name)) { it.box.remove(); known.delete(name); }
    for (const device of state.devices) {
      const it = known.get(device.name) || card(device.name);
      show(it, device, state.clock);
      if (device.state === "attached" && Date.now() - it.mapped > 5000) {
        it.mapped = Date.now();
        drawMap(it, device.name);
      }
    }
  } catch (error) {
    about.className = "bad";
    about.textContent = "the daemon does not answer";
  }
  setTimeout(renew, document.hidden ? 10000 : 2000);
}
renew();
</script></body></html>
"""
