// Draws a request's lanes on one time axis. Arrow keys walk along a lane's bars.

import { byId, h, put, s } from "./dom.js";
import { duration, number, shortId } from "./format.js";
import { handoffEnd, laneText, lanesOf } from "./lanes.js";

const LABEL_PX = 176;
const NARROW_PX = 560;
const AXIS_PX = 26;
const STEPS = [1, 2, 5];

let record = null;

export function startWaterfall() {
  byId("zoom").addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) > 1 && record) draw();
    width = entry.contentRect.width;
  }).observe(byId("waterfall-body"));
}

/** Shows a request; a failure to find it is a text. */
export function showWaterfall(found) {
  record = found;
  draw();
}

export function showMissing(text) {
  record = null;
  byId("zoom").hidden = true;
  put(byId("waterfall-body"), h("p", { class: "quiet" }, text));
}

function draw() {
  const body = byId("waterfall-body");
  const lanes = lanesOf(record);
  byId("zoom").hidden = !record.tracks.some((track) => track.name === "kv_chunk");
  const isZoomed = !byId("zoom").hidden && new FormData(byId("zoom-form")).get("zoom") === "handoff";
  const scale = makeScale(body.clientWidth, isZoomed ? handoffEnd(record) : record.elapsed_s);
  const readout = h("p", { class: "readout", role: "status" }, "Point at a bar, or focus a lane and use the arrow keys.");
  const say = (text) => { readout.textContent = text; };
  put(
    body,
    summary(),
    lanes.length ? chart(lanes, scale, say) : h("p", { class: "quiet" }, "No stage has ended yet."),
    readout,
    key(lanes),
    table(),
  );
}

function summary() {
  const place = record.placement;
  const entries = [
    ["Request", record.request_id], ["Outcome", record.outcome || record.state],
    ["Tokens", `${number(record.prompt_tokens)} → ${number(record.output_tokens)}`],
    ["TTFT", duration(record.ttft_s)], ["Total", duration(record.elapsed_s)],
    ["Prefill", place ? (place.local_prefill ? "at the decode worker" : shortId(place.prefill_worker_id)) : "–"],
    ["Decode", place ? shortId(place.decode_worker_id) : "–"], ["Placed by", place?.reason.replaceAll("_", " ") ?? "–"],
    ["Cached", place ? `${number(Math.max(place.decode_cached_tokens, place.prefill_cached_tokens))} tokens` : "–"],
    ["Drafts accepted", record.draft_tokens ? `${number(record.accepted_tokens)} of ${number(record.draft_tokens)}` : "–"],
  ];
  return h("dl", { class: "line-figures" }, entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function makeScale(width, endS) {
  const isNarrow = width < NARROW_PX;
  const left = isNarrow ? 0 : LABEL_PX;
  const perS = (width - left - 10) / Math.max(endS, 1e-6);
  return { width, left, isNarrow, endS, x: (atS) => left + Math.min(atS, endS * 1.02) * perS };
}

function chart(lanes, scale, say) {
  let y = AXIS_PX;
  const groups = [];
  for (const lane of lanes) {
    const group = drawLane(lane, y, scale, say);
    groups.push(group.element);
    y += group.height;
  }
  const svg = s("svg", {
    class: "waterfall", width: scale.width, height: y + 20, role: "group",
    "aria-label": `Waterfall of request ${record.request_id}: ${lanes.length} lanes over ${duration(scale.endS)}`,
  });
  svg.append(axis(scale, y), ...groups);
  if (record.ttft_s !== null && record.ttft_s <= scale.endS) svg.append(firstToken(scale, y));
  return svg;
}

function axis(scale, height) {
  const roughS = scale.endS / (scale.isNarrow ? 3 : 7);
  const power = 10 ** Math.floor(Math.log10(roughS));
  const stepS = power * (STEPS.find((step) => step * power >= roughS) ?? 10);
  const group = s("g", { class: "axis", "aria-hidden": "true" });
  for (let atS = 0; atS <= scale.endS; atS += stepS) {
    const x = Math.round(scale.x(atS)) + 0.5;
    const isLast = x > scale.width - 50;
    group.append(
      s("line", { x1: x, x2: x, y1: AXIS_PX - 6, y2: height }),
      s("text", { x: isLast ? x - 4 : x + 4, y: AXIS_PX - 12, "text-anchor": isLast ? "end" : "start" }, tick(atS, stepS)),
    );
  }
  return group;
}

const tick = (atS, stepS) =>
  stepS >= 1 ? `${Math.round(atS)} s` : stepS >= 0.001 ? `${Math.round(atS * 1e3)} ms` : `${Math.round(atS * 1e6)} µs`;

function firstToken(scale, height) {
  const x = Math.round(scale.x(record.ttft_s)) + 0.5;
  const isLeft = x > scale.width - 130;
  return s("g", { class: "first-token" },
    s("line", { x1: x, x2: x, y1: AXIS_PX - 6, y2: height + 16 }),
    s("text", { x: isLeft ? x - 5 : x + 5, y: height + 14, "text-anchor": isLeft ? "end" : "start" },
      `first token ${duration(record.ttft_s)}`));
}

function drawLane(lane, top, scale, say) {
  const barHeight = lane.isTall ? 34 : 18;
  const labelHeight = scale.isNarrow ? 18 : 0;
  const y = top + 8 + labelHeight;
  const element = s("g", { class: "lane-row", tabindex: 0, role: "img", "aria-label": laneText(lane), "data-key": lane.key });
  const labelY = scale.isNarrow ? top + 18 : y + 8;
  element.append(
    s("rect", { class: "lane-back", x: 0, y: top + 2, width: scale.width, height: labelHeight + barHeight + 12, rx: 3 }),
    s("text", { class: "lane-name", x: 4, y: labelY }, lane.name),
    s("text", { class: "lane-note", x: scale.isNarrow ? 4 + lane.name.length * 8 + 10 : 4, y: scale.isNarrow ? labelY : labelY + 14 }, lane.note),
  );
  const bars = lane.bars.filter((bar) => bar.startS < scale.endS).map((bar) => drawBar(bar, y, barHeight, scale, say));
  element.append(...bars.map((entry) => entry.element));
  walk(element, bars, say);
  return { element, height: labelHeight + barHeight + 16 };
}

function drawBar(bar, y, height, scale, say) {
  const x = scale.x(bar.startS);
  const width = Math.max(1.5, scale.x(bar.endS) - x - 0.6);
  const own = Math.max(4, height * (bar.height ?? 1));
  const element = s("g", { class: `bar ${bar.kind}`, onpointerenter: () => say(bar.text) },
    s("rect", { x, y: y + height - own, width, height: own }),
    bar.accepted ? s("rect", { class: "accepted", x, y: y + height - own, width, height: own * bar.accepted }) : null,
    s("title", {}, bar.text));
  return { element, bar };
}

/** Left and right choose a bar of the focused lane. */
function walk(lane, bars, say) {
  let at = -1;
  const choose = (index) => {
    bars[at]?.element.classList.remove("chosen");
    at = Math.max(0, Math.min(bars.length - 1, index));
    bars[at]?.element.classList.add("chosen");
    if (bars[at]) say(bars[at].bar.text);
  };
  lane.addEventListener("focus", () => choose(0));
  lane.addEventListener("blur", () => bars[at]?.element.classList.remove("chosen"));
  lane.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: bars.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    choose(moves[event.key]);
  });
}

function key(lanes) {
  const kinds = new Set(lanes.flatMap((lane) => lane.bars.map((bar) => bar.kind)));
  const names = { wait: "tokenizer and scheduler", queue: "queue", prefill: "prefill chunk", kv: "KV chunk", span: "hand-off", step: "decode step" };
  const items = Object.entries(names).filter(([kind]) => kinds.has(kind)).map(([kind, name]) =>
    h("li", {}, h("span", { class: `swatch bar-swatch ${kind}`, "aria-hidden": "true" }), name));
  if (lanes.some((lane) => lane.bars.some((bar) => bar.accepted))) {
    items.push(h("li", {}, h("span", { class: "swatch bar-swatch accepted", "aria-hidden": "true" }), "accepted drafts"));
  }
  return h("ul", { class: "legend", "aria-label": "Kinds of bars" }, items);
}

function table() {
  const head = ["Stage", "Start", "Length", "Worker"];
  const rows = [...record.stages].sort((a, b) => a.start_s - b.start_s).map((stage) => h("tr", {},
    h("th", { scope: "row" }, stage.name.replaceAll("_", " ")),
    h("td", {}, duration(stage.start_s)), h("td", {}, duration(stage.duration_s)), h("td", { class: "name" }, stage.worker_id || "–")));
  return h("details", {}, h("summary", {}, "Stages as a table"),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Stages" },
      h("table", {}, h("thead", {}, h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)))), h("tbody", {}, rows))));
}
