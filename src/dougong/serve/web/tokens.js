// A reply drawn token by token, each with its probability and what might have stood instead.
import { word } from "./words.js";

const tip = document.getElementById("tip");
let shown = null;

// A piece of text with the tokens it came from: one span each where their texts add up, else one for all of them.
export function parts({ text, tokens }) {
  if (tokens.length < 2) return [[text, tokens]];
  if (tokens.map((token) => token[0]).join("") === text) return tokens.map((token) => [token[0], [token]]);
  return [[text, tokens]];
}

export function draw(into, [text, tokens]) {
  if (!text) return;
  const span = document.createElement("span");
  span.textContent = text;
  if (tokens.length) {
    span.className = "token";
    span.told = tokens;
    const least = Math.exp(Math.min(...tokens.map((token) => token[1])));
    span.dataset.odds = least > 0.5 ? 0 : least > 0.2 ? 1 : least > 0.05 ? 2 : least > 0.01 ? 3 : 4;
  }
  into.append(span);
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return (share >= 10 ? share.toFixed(0) : share >= 0.1 ? share.toFixed(1) : share > 0.001 ? share.toFixed(3) : "< 0.001") + " %";
};
const visible = (text) => text === "" ? "∅" : text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");

function row(text, logprob, chosen) {
  const line = document.createElement("div");
  line.className = chosen ? "chosen" : "";
  const name = document.createElement("code"), bar = document.createElement("span"), number = document.createElement("span");
  name.textContent = visible(text);
  bar.className = "bar";
  bar.style.setProperty("--share", Math.exp(logprob));
  number.textContent = percent(logprob);
  line.append(name, bar, number);
  return line;
}

export function show(span) {
  hide();
  shown = span;
  span.classList.add("looked-at");
  tip.replaceChildren();
  for (const [text, logprob, rivals] of span.told) {
    tip.append(row(text, logprob, true));
    for (const [rival, odds] of rivals) if (rival !== text) tip.append(row(rival, odds, false));
  }
  tip.hidden = false;
  const at = span.getClientRects()[0] || span.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = at.bottom + 8 + own.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(at.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (below ? at.bottom + 6 : Math.max(8, at.top - own.height - 6)) + "px";
}

export function hide() {
  if (shown) shown.classList.remove("looked-at");
  shown = null;
  tip.hidden = true;
}

// Arrow keys walk from token to token; what is looked at is said aloud by the status line.
export function walk(event, say) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.target.closest("textarea, input, select")) return;
  const tokens = [...event.currentTarget.querySelectorAll(".token")];
  if (!tokens.length) return;
  event.preventDefault();
  const at = tokens.indexOf(shown);
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, at < 0 ? (step > 0 ? 0 : tokens.length - 1) : at + step))];
  next.scrollIntoView({ block: "nearest" });
  show(next);
  say(next.told.map(([text, logprob, rivals]) => `${visible(text)} ${word("probability")} ${percent(logprob)}; ${word("others")} ` +
    rivals.filter(([rival]) => rival !== text).map(([rival, odds]) => `${visible(rival)} ${percent(odds)}`).join(", ")).join(" · "));
}
