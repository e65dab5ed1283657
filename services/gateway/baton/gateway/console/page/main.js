// The console's page: follows the system's state and hands it to the parts that show it.

import { getJson, setKey } from "./api.js";
import { byId } from "./dom.js";
import { showFigures } from "./figures.js";
import { follow } from "./live.js";
import { loadModels, startPlayground, tellPlayground } from "./playground.js";
import { choose, showRequests } from "./requests.js";
import { startTheme } from "./theme.js";
import { showTopology, startTopology } from "./topology.js";
import { showMissing, showWaterfall, startWaterfall } from "./waterfall.js";

const REQUEST = "#request/";
let models = null; // as last asked for; null asks with the next state
let shown = { id: "", isOver: false };

function onState(state) {
  showFigures(state);
  showTopology(state);
  showRequests(state);
  const served = [...new Set(state.services.map((service) => service.model))].join();
  if (served !== models) {
    models = served;
    loadModels().catch((error) => {
      models = null;
      tellPlayground(error.message);
    });
  }
  const record = state.requests.find((request) => request.request_id === shown.id);
  if (record && !shown.isOver) loadWaterfall();
}

async function loadWaterfall() {
  const { id } = shown;
  if (!id) return;
  try {
    const record = await getJson(`/console/api/requests/${encodeURIComponent(id)}`);
    if (shown.id !== id) return;
    shown.isOver = Boolean(record.outcome);
    showWaterfall(record);
  } catch (error) {
    if (shown.id === id) showMissing(error.message);
  }
}

function show(id) {
  shown = { id, isOver: false };
  choose(id);
  return loadWaterfall();
}

async function onHash() {
  if (!location.hash.startsWith(REQUEST)) return;
  await show(decodeURIComponent(location.hash.slice(REQUEST.length)));
  byId("waterfall").scrollIntoView({ block: "start" });
  byId("waterfall-title").focus({ preventScroll: true });
}

function showLink(word, detail) {
  const element = byId("link-state");
  element.className = `state ${word === "live" ? "ready" : "lost"}`;
  const text = detail ? `${word}: ${detail}` : word;
  if (element.lastElementChild.textContent !== text) element.lastElementChild.textContent = text;
}

/** Asks for an API key; done once there is one to try. */
function askKey(message) {
  const form = byId("key-form");
  byId("key-problem").textContent = message;
  form.hidden = false;
  byId("key").focus();
  return new Promise((resume) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      setKey(byId("key").value);
      byId("key").value = "";
      form.hidden = true;
      models = null;
      resume();
    }, { once: true });
  });
}

startTheme();
startTopology();
startWaterfall();
startPlayground((id) => show(id));
window.addEventListener("hashchange", onHash);
onHash();
follow({ state: onState, link: showLink, key: askKey });
