// A request's record as lanes of bars: which service did what, and when. No drawing here.

import { bytes, duration, number, plural, shortId } from "./format.js";

const TOKENIZER = new Set(["tokenize", "detokenize"]);
const SCHEDULER = new Set(["admit", "reserve", "relay", "retry"]);
const WORDS = {
  admit: "admission", reserve: "reserve KV blocks", relay: "relay", retry: "retry",
  tokenize: "tokenize", detokenize: "detokenize", queue: "queue", prefill: "prefill",
  handoff: "KV hand-off", first_decode: "first decode step", decode: "decode",
};

/** Lanes in the order in which a request meets them: {key, name, note, bars: [bar]}. */
export function lanesOf(record) {
  const stages = (test) => record.stages.filter(test).map((stage) => stageBar(stage));
  const tracks = (name) => record.tracks.filter((track) => track.name === name);
  const prefills = workersOf(record, "prefill_chunk", (stage) => ["queue", "prefill"].includes(stage.name));
  const lanes = [
    { key: "tokenizer", name: "tokenizer", note: "text ⇄ tokens", bars: stages((s) => TOKENIZER.has(s.name)) },
    { key: "scheduler", name: "scheduler", note: "admit, reserve, relay", bars: stages((s) => SCHEDULER.has(s.name)) },
    ...prefills.map((worker) => prefillLane(record, worker)),
    ...tracks("kv_chunk").map((track) => handoffLane(record, track)),
    ...tracks("decode_step").map((track) => decodeLane(record, track)),
  ];
  return lanes.filter((lane) => lane.bars.length);
}

function workersOf(record, trackName, test) {
  const found = record.tracks.filter((track) => track.name === trackName).map((track) => track.worker_id);
  for (const stage of record.stages) {
    if (test(stage) && stage.worker_id && !found.includes(stage.worker_id)) found.push(stage.worker_id);
  }
  return found;
}

function prefillLane(record, worker) {
  const track = record.tracks.find((t) => t.name === "prefill_chunk" && t.worker_id === worker);
  const own = record.stages.filter((stage) => stage.worker_id === worker);
  const bars = own.filter((stage) => stage.name === "queue").map(stageBar);
  if (!track) {
    bars.push(...own.filter((stage) => stage.name === "prefill").map(stageBar));
  } else {
    bars.push(...track.slices.map((slice, i) => sliceBar(slice, "prefill", `chunk ${i + 1}`, [
      plural(slice.num_tokens, "token"),
    ])));
  }
  return { key: `prefill ${worker}`, name: shortId(worker), note: "queue, prefill chunks", bars };
}

function handoffLane(record, track) {
  const stage = record.stages.find((s) => s.name === "handoff" && s.worker_id === track.worker_id);
  const span = { startS: track.slices[0].start_s, endS: track.slices.at(-1).end_s, kind: "span" };
  const bars = stage ? [{ ...span, text: stageBar(stage).text }] : [];
  bars.push(...track.slices.map((slice, i) => sliceBar(slice, "kv", `KV chunk ${i + 1}`, [
    bytes(slice.num_bytes), plural(slice.num_parts, "message"),
  ])));
  return { key: `kv ${track.worker_id}`, name: "KV hand-off", note: `arriving at ${shortId(track.worker_id)}`, bars, isAccent: true };
}

function decodeLane(record, track) {
  const tallest = Math.max(...track.slices.map((slice) => slice.num_tokens / slice.num_parts));
  const bars = track.slices.map((slice, i) => ({
    ...sliceBar(slice, "step", slice.num_parts > 1 ? `${slice.num_parts} decode steps` : `decode step ${i + 1}`, [
      plural(slice.num_tokens, "token"),
      slice.draft_tokens ? `${number(slice.accepted_tokens)} of ${plural(slice.draft_tokens, "draft")} accepted` : "",
    ]),
    height: slice.num_tokens / slice.num_parts / Math.max(1, tallest),
    accepted: slice.num_tokens ? slice.accepted_tokens / slice.num_tokens : 0,
  }));
  const note = track.slices.some((slice) => slice.draft_tokens) ? "steps, accepted drafts" : "decode steps";
  return { key: `decode ${track.worker_id}`, name: shortId(track.worker_id), note, bars, isTall: true };
}

function stageBar(stage) {
  const facts = [shortId(stage.worker_id), stage.num_tokens ? plural(stage.num_tokens, "token") : "",
    stage.num_bytes ? bytes(stage.num_bytes) : ""];
  const kind = stage.name === "prefill" ? "prefill" : stage.name === "queue" ? "queue" : "wait";
  return bar(stage.start_s, stage.start_s + stage.duration_s, kind, WORDS[stage.name] ?? stage.name, facts);
}

const sliceBar = (slice, kind, name, facts) => bar(slice.start_s, slice.end_s, kind, name, facts);

function bar(startS, endS, kind, name, facts) {
  const when = `${duration(startS)} + ${duration(endS - startS)}`;
  return { startS, endS, kind, text: [name, when, ...facts].filter(Boolean).join(" · ") };
}

/** What a lane says as a whole, for those who cannot see it. */
export function laneText(lane) {
  const startS = Math.min(...lane.bars.map((b) => b.startS));
  const endS = Math.max(...lane.bars.map((b) => b.endS));
  return `${lane.name}, ${lane.note}: ${plural(lane.bars.length, "bar")}, from ${duration(startS)} to ${duration(endS)}`;
}

/** The time until which the hand-off matters: the first decode step, and a little more. */
export function handoffEnd(record) {
  const ends = record.tracks.filter((t) => t.name !== "decode_step").flatMap((t) => t.slices.map((s) => s.end_s));
  const steps = record.tracks.filter((t) => t.name === "decode_step").map((t) => t.slices[0].end_s);
  const endS = Math.max(record.ttft_s ?? 0, ...ends, ...steps);
  return endS > 0 ? Math.min(record.elapsed_s, endS * 1.08) : record.elapsed_s;
}
