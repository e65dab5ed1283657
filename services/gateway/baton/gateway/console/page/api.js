// Calls to the gateway that served this page. The API key, if one is needed, lives in this tab only.

import { forget, recall, remember } from "./storage.js";

const KEY = "baton-key";

export class HttpFailure extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => remember("sessionStorage", KEY, key);
export const dropKey = () => forget("sessionStorage", KEY);

async function call(path, options = {}) {
  const key = recall("sessionStorage", KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, credentials: "omit" });
  if (response.ok) return response;
  let message = `the gateway answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not a body of ours: the status says enough.
  }
  throw new HttpFailure(response.status, message);
}

export const getJson = async (path) => (await call(path)).json();

/** Server-sent events as they come: {event, data}. Ends with the stream, or with `signal`. */
export async function* events(path, options = {}) {
  const response = await call(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = parse(block);
        if (found.data) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const found = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("data:")) found.data += line.slice(5).trimStart();
    if (line.startsWith("event:")) found.event = line.slice(6).trim();
  }
  return found;
}
