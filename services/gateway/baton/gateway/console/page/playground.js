// A request of one's own: streamed, stoppable, measured as the browser saw it.

import { events, getJson } from "./api.js";
import { byId, h, put } from "./dom.js";
import { duration, number } from "./format.js";

const EXAMPLE = `class Interval:
    """A closed interval of numbers."""

    def __init__(self, low, high):
        self.low = low
        self.high = high

    def contains(self, value):
`;
let control = null;

/** `onStart(requestId)` hears the id of a request once it is known. */
export function startPlayground(onStart) {
  byId("prompt").value = EXAMPLE;
  byId("play-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!control) run(onStart);
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("play-form").requestSubmit();
  });
  byId("stop").addEventListener("click", () => control?.abort());
}

/** Fills in the models that can be used. */
export async function loadModels() {
  const select = byId("model");
  const chosen = select.value;
  const models = (await getJson("/v1/models")).data.map((model) => model.id);
  put(select, models.map((id) => h("option", { value: id, selected: id === chosen }, id)));
}

/** Says something where the state of the request is shown. */
export const tellPlayground = (text) => { byId("play-state").textContent = text; };

function request() {
  const isChat = new FormData(byId("play-form")).get("kind") === "chat";
  const prompt = byId("prompt").value;
  const body = {
    model: byId("model").value,
    max_tokens: Number(byId("max-tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    return_token_ids: true, // counts tokens also of an answer that is stopped
    ...(byId("seed").value ? { seed: Number(byId("seed").value) } : {}),
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  return [isChat ? "/v1/chat/completions" : "/v1/completions", body];
}

async function run(onStart) {
  const [path, body] = request();
  const answer = new Answer(onStart);
  control = new AbortController();
  setBusy(true);
  let ending = "done";
  try {
    const options = {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: control.signal,
    };
    for await (const { data } of events(path, options)) {
      if (data === "[DONE]") break;
      answer.add(JSON.parse(data));
    }
  } catch (error) {
    ending = error.name === "AbortError" ? "stopped" : error.message;
  }
  control = null;
  setBusy(false);
  answer.end(ending);
}

function setBusy(isBusy) {
  const run = byId("run");
  const stop = byId("stop");
  const moves = isBusy ? document.activeElement === run : document.activeElement === stop;
  run.disabled = isBusy;
  stop.disabled = !isBusy;
  if (moves) (isBusy ? stop : run).focus();
  byId("answer").setAttribute("aria-busy", String(isBusy));
}

/** One answer as it comes. */
class Answer {
  constructor(onStart) {
    this.onStart = onStart;
    this.startedMs = performance.now();
    this.firstMs = null;
    this.lastMs = null;
    this.numTokens = 0;
    this.requestId = "";
    this.finish = "";
    byId("answer").textContent = "";
    byId("play-state").textContent = "running";
    byId("play-link").hidden = true;
    put(byId("play-figures"));
  }

  add(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (!this.requestId && chunk.id) {
      this.requestId = chunk.id.replace(/^(chatcmpl|cmpl)-/, "");
      const link = byId("play-link");
      link.href = `#request/${encodeURIComponent(this.requestId)}`;
      link.hidden = false;
      this.onStart(this.requestId);
    }
    const choice = chunk.choices[0];
    if (!choice) return;
    this.numTokens += choice.token_ids?.length ?? 0;
    const text = choice.text ?? choice.delta?.content ?? "";
    this.finish = choice.finish_reason ?? this.finish;
    if (!text) return;
    this.lastMs = performance.now();
    this.firstMs ??= this.lastMs;
    const answer = byId("answer");
    const isAtEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 8;
    answer.append(text);
    if (isAtEnd) answer.scrollTop = answer.scrollHeight;
  }

  end(ending) {
    byId("play-state").textContent = ending === "done" ? this.finish || "done" : ending;
    const entries = [["TTFT", this.firstMs === null ? "–" : duration((this.firstMs - this.startedMs) / 1e3)]];
    const decodeS = (this.lastMs - this.firstMs) / 1e3;
    if (this.numTokens > 1 && decodeS > 0) {
      entries.push(["Tokens", number(this.numTokens)], ["Tokens/s", number((this.numTokens - 1) / decodeS)]);
    }
    entries.push(["Total", duration((performance.now() - this.startedMs) / 1e3)]);
    put(byId("play-figures"), entries.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }
}
