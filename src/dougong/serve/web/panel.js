// The settings beside the conversation: sampling dials, stops, the system prompt, and the list of keys.
import { DEFAULTS, save, settings } from "./store.js";
import { word } from "./words.js";

const DIALS = [["temperature", 0, 2, 0.05], ["top_p", 0.05, 1, 0.01], ["top_k", 0, 200, 1], ["min_p", 0, 0.5, 0.01],
  ["repetition_penalty", 1, 2, 0.01], ["max_tokens", 1, 4096, 1], ["seed", 0, Number.MAX_SAFE_INTEGER, 1]];
const KEYS = [["Enter", "k_send"], ["Shift + Enter", "k_line"], ["Esc", "k_stop"], ["Alt + N", "k_new"], ["↑", "k_edit"],
  ["← →", "k_walk"]];

export function panel(at, changed) {
  const set = (name, value) => { settings[name] = value; save(); changed(); };

  function dial([name, least, most, step]) {
    const label = document.createElement("label"), said = document.createElement("span"), number = document.createElement("input");
    said.textContent = word(name);
    Object.assign(number, { type: "number", min: least, max: most, step, value: settings[name] });
    label.append(said, number);
    const put = (value) => {
      if (name === "seed" && value === "") return set(name, "");
      const given = Math.min(most, Math.max(least, Number(value)));
      if (value !== "" && Number.isFinite(given)) set(name, Number.isInteger(step) ? Math.round(given) : given);
    };
    if (name === "seed" || name === "max_tokens") number.addEventListener("change", () => { put(number.value); number.value = settings[name]; });
    else {
      const slider = document.createElement("input");
      Object.assign(slider, { type: "range", min: least, max: most, step, value: settings[name] });
      slider.setAttribute("aria-label", word(name));
      slider.addEventListener("input", () => { put(slider.value); number.value = settings[name]; });
      number.addEventListener("change", () => { put(number.value); slider.value = number.value = settings[name]; });
      label.append(slider);
    }
    return label;
  }

  function draw() {
    at("dials").replaceChildren(...DIALS.map(dial));
    for (const name of ["system", "stops"]) at(name).value = settings[name];
    for (const name of ["inspect", "shade"]) at(name).checked = settings[name];
    at("shortcuts").replaceChildren(...KEYS.flatMap(([key, what]) => {
      const name = document.createElement("dt"), said = document.createElement("dd");
      name.textContent = key;
      said.textContent = word(what);
      return [name, said];
    }));
  }

  for (const name of ["system", "stops"]) at(name).addEventListener("change", (event) => set(name, event.target.value));
  for (const name of ["inspect", "shade"]) at(name).addEventListener("change", (event) => set(name, event.target.checked));
  at("reset").addEventListener("click", () => { Object.assign(settings, DEFAULTS); save(); draw(); changed(); });
  return draw;
}
