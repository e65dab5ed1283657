// Services and workers as cards: state, load, and every KV block by its state.

import { byId, h, put, s } from "./dom.js";
import { bytes, duration, number, plural, shortId } from "./format.js";

const KV_STATES = [
  ["in_use", "in use"], ["held", "held"], ["reserved", "reserved"], ["filling", "filling"],
  ["ready", "ready"], ["quarantined", "quarantined"], ["cached", "cached"], ["free", "free"],
];
const EDGE_ROLES = ["gateway", "scheduler", "tokenizer", "cache"];
const HANDING_OFF = new Set(["prefilling", "transferring"]);

export function startTopology() {
  put(byId("legend"), KV_STATES.map(([state, name]) =>
    h("li", {}, h("span", { class: `swatch kv-${state}`, "aria-hidden": "true" }), name)));
}

/** Shows the services of a state. */
export function showTopology(state) {
  const of = (role) => state.services.filter((service) => service.role === role);
  put(
    byId("topology-body"),
    h("div", { class: "lane edge" }, h("h3", {}, "Edge"),
      EDGE_ROLES.flatMap(of).map(edgeCard), busCard(state.bus_connected)),
    h("div", { class: "lane" }, h("h3", {}, "Prefill"), pool(of("prefill"), prefillFacts)),
    flow(state, of("prefill")),
    h("div", { class: "lane" }, h("h3", {}, "Decode"), pool(of("decode"), decodeFacts)),
  );
}

const pool = (workers, facts) =>
  workers.length ? workers.map((worker) => workerCard(worker, facts(worker))) : h("p", { class: "quiet" }, "no worker");

function head(service, name) {
  return h("div", { class: "card-head" },
    h("span", { class: "name" }, name),
    h("span", { class: `state ${service.state}` },
      h("span", { class: "dot", "aria-hidden": "true" }), service.state));
}

function edgeCard(service) {
  const waiting = service.waiting ? `, ${number(service.waiting)} waiting` : "";
  return smallCard(service, service.role === "cache"
    ? `${plural(service.stats.stored_blocks ?? 0, "block")} stored`
    : `${number(service.running)} running${waiting}`);
}

const busCard = (isConnected) => smallCard(
  { role: "bus", worker_id: "bus", state: isConnected ? "ready" : "lost" },
  isConnected ? "connected" : "requests go on without it");

const smallCard = (service, facts) =>
  h("article", { class: `card small ${service.state}`, "aria-label": service.worker_id },
    head(service, service.role), h("p", { class: "quiet" }, facts));

function workerCard(worker, facts) {
  const isLost = worker.state === "lost";
  return h("article", { class: `card worker ${worker.state}`, "aria-label": worker.worker_id },
    head(worker, shortId(worker.worker_id)),
    isLost
      ? h("p", {}, "Stopped answering; its requests went elsewhere.")
      : [queue(worker), blocks(worker), h("dl", { class: "facts" }, facts.map(([name, value]) =>
          h("div", {}, h("dt", {}, name), h("dd", {}, value))))]);
}

/** One mark per sequence: filled while it is computed, hollow while it waits. */
function queue(worker) {
  const total = worker.running + worker.waiting;
  const marks = Array.from({ length: Math.min(total, 24) }, (_, i) =>
    h("span", { class: i < worker.running ? "mark" : "mark waiting" }));
  return h("p", { class: "load" },
    marks.length ? h("span", { class: "marks", "aria-hidden": "true" }, marks) : null,
    `${number(worker.running)} running, ${number(worker.waiting)} waiting`);
}

function blocks(worker) {
  const total = Object.values(worker.kv_blocks).reduce((sum, count) => sum + count, 0);
  const present = KV_STATES.filter(([state]) => worker.kv_blocks[state]);
  const text = present.map(([state, name]) => `${name} ${number(worker.kv_blocks[state])}`).join(", ");
  let x = 0;
  const parts = present.map(([state]) => {
    const width = (worker.kv_blocks[state] / Math.max(1, total)) * 1000;
    const part = s("rect", { class: `kv-${state}`, x: x.toFixed(1), y: 0, width: Math.max(4, width).toFixed(1), height: 10 });
    x += width;
    return part;
  });
  return h("div", { class: "kv" },
    s("svg", { viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img", "aria-label": `KV blocks: ${text}` }, parts),
    h("p", { class: "quiet" }, text || "no KV blocks"));
}

function prefillFacts(worker) {
  const { prefill_tokens_per_s: rate, queued_prefill_tokens: queued } = worker.stats;
  return [
    ["prefill", rate ? `${number(rate)} tok/s` : "–"],
    ["to compute", plural(queued ?? 0, "token")],
  ];
}

function decodeFacts(worker) {
  const { decode_step_s: step, draft_tokens: drafts, accepted_tokens: accepted } = worker.stats;
  return [
    ["step", duration(step || null)],
    ["drafts accepted", drafts ? `${Math.round((accepted / drafts) * 100)} %` : "–"],
  ];
}

/** The hand-off between the pools: lit while KV is on its way. */
function flow(state, prefills) {
  const isActive = state.requests.some((request) => HANDING_OFF.has(request.state));
  const rate = Math.max(0, ...prefills.map((worker) => worker.stats.push_bytes_per_s ?? 0));
  return h("div", { class: `flow${isActive ? " active" : ""}` },
    h("span", { class: "flow-name" }, "KV hand-off"),
    s("svg", { viewBox: "0 0 100 24", "aria-hidden": "true", preserveAspectRatio: "none" },
      s("path", { class: "rail", d: "M2 12H96" }),
      s("path", { class: "train", d: "M2 12H96" }),
      s("path", { class: "tip", d: "M90 6l8 6-8 6" })),
    h("span", { class: "quiet" }, rate ? `${bytes(rate)}/s` : "idle"));
}
