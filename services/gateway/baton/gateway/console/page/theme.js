// Light, dark, or as the system says; the choice outlives the page.

import { byId } from "./dom.js";
import { recall, remember } from "./storage.js";

const NAMES = ["auto", "light", "dark"];
const STORE = "baton-theme";

export function startTheme() {
  const button = byId("theme");
  let name = recall("localStorage", STORE);
  const show = () => {
    if (!NAMES.includes(name)) name = "auto";
    document.documentElement.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
  };
  button.addEventListener("click", () => {
    name = NAMES[(NAMES.indexOf(name) + 1) % NAMES.length];
    remember("localStorage", STORE, name);
    show();
  });
  show();
}
