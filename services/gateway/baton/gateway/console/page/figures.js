// The figures at the top: speeds of the last minute, and what recent requests waited for.

import { byId, h, put, s } from "./dom.js";
import { duration, number, percentile } from "./format.js";

const WINDOW = 60;
const SMOOTH_S = 3;
const history = [];

/** Takes a state in and shows the figures. */
export function showFigures(state) {
  if (history.length && state.clock_s < history.at(-1).clock_s) history.length = 0;
  history.push({ clock_s: state.clock_s, prompt: state.prompt_tokens, output: state.output_tokens });
  if (history.length > WINDOW + SMOOTH_S) history.shift();
  const output = rates("output");
  const prompt = rates("prompt");
  const ended = state.requests.filter((request) => request.state === "finished");
  const workers = state.services.filter((service) => service.role === "decode");
  const sum = (field) => workers.reduce((total, worker) => total + worker[field], 0);
  put(
    byId("figures"),
    figure("Output tokens/s", number(output.at(-1) ?? 0), sparkline(output)),
    figure("Prompt tokens/s", number(prompt.at(-1) ?? 0), sparkline(prompt)),
    figure("TTFT, median", duration(percentile(ended.map((r) => r.ttft_s), 0.5)),
      note(`p95 ${duration(percentile(ended.map((r) => r.ttft_s), 0.95))}`)),
    figure("Per output token", duration(percentile(ended.map(tpot).filter(Boolean), 0.5)),
      note(`over ${ended.length} requests`)),
    figure("Decoding", number(sum("running")), note(`${number(sum("waiting"))} waiting`)),
  );
}

export const tpot = (request) =>
  request.output_tokens > 1 && request.ttft_s !== null
    ? (request.elapsed_s - request.ttft_s) / (request.output_tokens - 1)
    : null;

function rates(field) {
  const found = [];
  for (let i = 1; i < history.length; i += 1) {
    const from = history[Math.max(0, i - SMOOTH_S)];
    const to = history[i];
    found.push(Math.max(0, (to[field] - from[field]) / (to.clock_s - from.clock_s)));
  }
  return found;
}

function figure(name, value, below) {
  return h("div", { class: "figure" }, h("p", { class: "term" }, name), h("p", { class: "value" }, value), below);
}

const note = (text) => h("p", { class: "quiet" }, text);

function sparkline(values) {
  const width = 120;
  const height = 22;
  const top = Math.max(1, ...values);
  const points = values.slice(-WINDOW).map((value, i, all) => {
    const x = width - (all.length - 1 - i) * (width / (WINDOW - 1));
    return `${x.toFixed(1)},${(height - 1 - (value / top) * (height - 3)).toFixed(1)}`;
  });
  const last = points.at(-1);
  return s(
    "svg",
    { class: "spark", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    last ? s("polyline", { points: points.join(" ") }) : null,
  );
}
