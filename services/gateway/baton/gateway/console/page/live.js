// The state of the system, once a second, for as long as the page is seen: a browser has few
// connections per host, and a page in a hidden tab or in its history would keep one of them.

import { dropKey, events } from "./api.js";

const FIRST_DELAY_MS = 500;
const LONGEST_DELAY_MS = 10_000;
const SILENCE_MS = 8_000;

/**
 * Follows the state. `on.state(state)` gets each one, `on.link(word, detail)` hears how the
 * connection is, and `await on.key(message)` returns once there is another API key.
 */
export async function follow(on) {
  let delayMs = FIRST_DELAY_MS;
  for (;;) {
    await seen();
    try {
      await read(on, () => { delayMs = FIRST_DELAY_MS; });
      on.link("lost", "the stream ended");
    } catch (error) {
      if (error.status === 401 || error.status === 403) {
        dropKey();
        on.link("lost", "a key is needed");
        await on.key(error.message);
        continue;
      }
      if (document.hidden) continue;
      on.link("lost", error.message);
    }
    await new Promise((resume) => { setTimeout(resume, delayMs); });
    delayMs = Math.min(LONGEST_DELAY_MS, delayMs * 2);
  }
}

const seen = async () => {
  while (document.hidden) {
    await new Promise((resume) => {
      document.addEventListener("visibilitychange", resume, { once: true });
    });
  }
};

async function read(on, progressed) {
  const control = new AbortController();
  const leave = () => control.abort();
  document.addEventListener("visibilitychange", leave);
  window.addEventListener("pagehide", leave);
  let timer = setTimeout(() => control.abort(), SILENCE_MS);
  try {
    for await (const { event, data } of events("/console/api/live", { signal: control.signal })) {
      clearTimeout(timer);
      timer = setTimeout(() => control.abort(), SILENCE_MS);
      progressed();
      const body = JSON.parse(data);
      if (event === "state") {
        on.link("live", "");
        on.state(body);
      } else {
        on.link("lost", body.error.message);
      }
    }
  } finally {
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", leave);
    window.removeEventListener("pagehide", leave);
  }
}
