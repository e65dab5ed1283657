// The latest requests, each with a bar of where its time went.

import { byId, h, put, s } from "./dom.js";
import { ago, duration, number } from "./format.js";

const GROUPS = { prefill: "bar-prefill", handoff: "bar-kv", decode: "bar-decode", first_decode: "bar-decode" };
const GOING = { prefilling: "bar-prefill", transferring: "bar-kv", decoding: "bar-decode" };
const rows = new Map();
let chosen = "";

/** Marks the request whose waterfall is shown. */
export function choose(requestId) {
  chosen = requestId;
  for (const [id, row] of rows) mark(id, row);
}

/** Shows the requests of a state. Rows stay the same elements, so that none moves under a click. */
export function showRequests(state) {
  const body = byId("requests-body");
  if (!state.requests.length) {
    put(body, h("p", { class: "quiet" }, "None yet. Run one in the playground."));
    rows.clear();
    return;
  }
  const seen = new Set(state.requests.map((request) => request.request_id));
  for (const id of rows.keys()) if (!seen.has(id)) rows.delete(id);
  const items = state.requests.map((request) => {
    const row = rows.get(request.request_id) ?? makeRow(request);
    update(row, request);
    return row.item;
  });
  const list = body.querySelector("ul") ?? h("ul", { class: "requests" });
  if (items.length !== list.children.length || items.some((item, i) => list.children[i] !== item)) {
    put(list, items);
  }
  if (!list.parentNode) put(body, list);
}

function makeRow(request) {
  const id = request.request_id;
  const link = h("a", { href: `#request/${encodeURIComponent(id)}`, "data-key": id });
  const row = { item: h("li", {}, link), link, shown: "", age: h("span", { class: "quiet" }) };
  rows.set(id, row);
  mark(id, row);
  return row;
}

function mark(id, row) {
  if (id === chosen) row.link.setAttribute("aria-current", "true");
  else row.link.removeAttribute("aria-current");
}

function update(row, request) {
  row.age.textContent = ago(request.age_s);
  const shown = JSON.stringify({ ...request, age_s: 0 });
  if (shown === row.shown) return;
  row.shown = shown;
  const outcome = request.outcome || request.state;
  const isBad = request.state === "failed";
  row.link.replaceChildren(
    h("span", { class: "request-head" },
      h("span", { class: "name" }, request.request_id),
      h("span", { class: isBad ? "bad" : "quiet" }, outcome), row.age),
    miniature(request),
    h("span", { class: "request-facts" },
      h("span", {}, `${number(request.prompt_tokens)} → ${number(request.output_tokens)} tokens`),
      h("span", {}, `TTFT ${duration(request.ttft_s)}`),
      h("span", {}, duration(request.elapsed_s)),
      request.placement && request.placement.attempts > 1
        ? h("span", {}, `${request.placement.attempts} attempts`) : null),
  );
}

function miniature(request) {
  const total = Math.max(request.elapsed_s, 1e-6);
  const ordered = [...request.stages].sort((a, b) => (a.name === "handoff") - (b.name === "handoff"));
  const parts = ordered.map((stage) => {
    const isOver = stage.name === "handoff"; // the hand-off lies over what it overlaps
    return s("rect", {
      class: GROUPS[stage.name] ?? "bar-wait",
      x: ((stage.start_s / total) * 1000).toFixed(1),
      width: Math.max(1.5, (stage.duration_s / total) * 1000).toFixed(1),
      y: isOver ? 6 : 0,
      height: isOver ? 4 : 10,
    });
  });
  const doneS = Math.max(0, ...request.stages.map((stage) => stage.start_s + stage.duration_s));
  if (!request.outcome && doneS < total) {
    const x = (doneS / total) * 1000;
    parts.push(s("rect", { class: `going ${GOING[request.state] ?? "bar-wait"}`, x, width: 1000 - x, y: 0, height: 10 }));
  }
  return s("svg", { class: "miniature", viewBox: "0 0 1000 10", preserveAspectRatio: "none", "aria-hidden": "true" }, parts);
}
