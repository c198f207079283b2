import * as api from "./api.js";
import * as store from "./store.js";
import * as tokens from "./tokens.js";
import { panel } from "./panel.js";
import { language, spell, word } from "./words.js";

const at = (id) => document.getElementById(id);
const turns = at("turns"), ask = at("ask"), talk = at("talk");
let models = [], running = null, editing = null;

const model = () => models.find((one) => one.id === at("model").value);
const trained = () => model()?.dougong.mode === "chat";
const mode = () => store.current ? store.current.mode : trained() ? "chat" : "continue";
// What is said is read aloud; where the page shows the same elsewhere, it is not shown twice.
const say = (text, past = false) => { at("status").textContent = text; at("status").classList.toggle("past", past); };
const counted = ({ n, s, f }) => word("done", { n, s: s ?? "–", f });

// ---- drawing

function button(name, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = word(name);
  made.addEventListener("click", act);
  return made;
}

function block(turn, index) {
  const article = document.createElement("article");
  article.className = turn.role;
  const name = document.createElement("h3");
  name.textContent = word(turn.role === "user" ? "you" : "assistant");
  const body = document.createElement("div");
  body.className = "body";
  if (turn.tokens) for (const part of turn.tokens) tokens.draw(body, part);
  else body.textContent = turn.text;
  article.append(name, body);
  if (turn.counts) {
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = `${counted(turn.counts)} · ${word("seed").split(/[ （(]/)[0]} ${turn.counts.seed}`;
    article.append(note);
  }
  if (turn.error) article.append(trouble(turn, index));
  if (!(running && running.turn === turn)) article.append(actions(turn, index, body));
  turn.body = body;
  return article;
}

function trouble(turn) {
  const box = document.createElement("p");
  box.className = "error";
  box.setAttribute("role", "alert");
  box.append(turn.error + " ", button("retry", () => again(store.current.turns.indexOf(turn))));
  return box;
}

function actions(turn, index, body) {
  const row = document.createElement("p");
  row.className = "actions";
  const copy = button("copy", async () => {
    await navigator.clipboard.writeText(turn.text);
    copy.textContent = word("copied");
    setTimeout(() => { copy.textContent = word("copy"); }, 1200);
  });
  row.append(copy, button("edit", () => edit(index, body)));
  if (turn.role === "assistant") row.append(button("again", () => again(index)));
  row.append(button("remove", () => { if (!running) { store.current.turns.splice(index); store.save(); draw(); } }));
  return row;
}

function welcome() {
  const box = document.createElement("div"), title = document.createElement("h1"), text = document.createElement("p");
  box.className = "welcome";
  title.textContent = word("empty_title_" + mode(), { m: model()?.id ?? "dougong" });
  text.textContent = word("empty_" + mode());
  box.append(title, text);
  if (mode() === "chat" && model() && !trained()) {
    const warning = document.createElement("p");
    warning.textContent = word("base_chat");
    box.append(warning);
  }
  return box;
}

function draw() {
  tokens.hide();
  const said = store.current?.turns ?? [];
  document.body.dataset.mode = mode();
  document.body.classList.toggle("shaded", store.settings.shade);
  turns.replaceChildren(...(said.length ? said.map(block) : [welcome()]));
  turns.setAttribute("aria-busy", String(!!running));
  for (const which of ["chat", "continue"]) {
    at("mode-" + which).setAttribute("aria-pressed", String(mode() === which));
  }
  ask.placeholder = word(mode() === "chat" ? "ask_chat" : said.length ? "ask_more" : "ask_continue");
  at("send").textContent = word(mode() === "continue" && !ask.value ? "go_on" : "send");
  at("send").hidden = !!running;
  at("stop").hidden = !running;
  list();
  about();
}

function about() {
  const facts = model()?.dougong;
  const spelled = new Intl.NumberFormat(language() ? "zh" : "en", { notation: "compact", maximumFractionDigits: 1 });
  at("about").textContent = facts ? [facts.family, facts.parameters && `${spelled.format(facts.parameters)} ${word("parameters")}`]
    .filter(Boolean).join(" · ") : "";
  const usage = store.current?.turns.at(-1)?.usage;
  at("room").textContent = usage && facts ? word("room", { n: usage.total_tokens, m: facts.context }) : "";
}

function list() {
  at("list").replaceChildren(...store.conversations.map((one) => {
    const item = document.createElement("li"), open = document.createElement("button"), gone = document.createElement("button");
    open.type = gone.type = "button";
    open.textContent = store.title(one) ?? word("untitled");
    if (one === store.current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => { if (!running) { store.choose(one); pickModel(one.model); side(false); draw(); } });
    gone.textContent = "✕";
    gone.className = "icon";
    gone.setAttribute("aria-label", `${word("remove")}: ${open.textContent}`);
    gone.addEventListener("click", () => { if (!running) { store.drop(one); draw(); } });
    item.append(open, gone);
    return item;
  }));
}

const nearEnd = () => talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
const toEnd = () => { talk.scrollTop = talk.scrollHeight; };

// ---- writing

async function write() {
  const conversation = store.current;
  const asked = api.request(conversation, conversation.turns, store.settings);
  const turn = { role: "assistant", text: "", tokens: [] };
  conversation.turns.push(turn);
  running = { turn, abort: new AbortController() };
  say(word("waiting"));
  draw();
  toEnd();
  try {
    for await (const piece of api.stream(asked, running.abort.signal)) {
      if (piece.usage) finished(turn, piece);
      else if (piece.text || piece.finish) grow(turn, piece);
    }
  } catch (error) {
    if (error.name === "AbortError") say(word("stopped"));
    else {
      turn.error = error.status === 401 ? word("key_needed") : error.message || word("offline");
      say("");
    }
  }
  const follow = nearEnd();
  if (!turn.text && !turn.error) conversation.turns.pop();
  if (!store.settings.inspect) delete turn.tokens;
  running = null;
  store.keep();
  draw();
  if (follow) toEnd();
}

function grow(turn, piece) {
  const follow = nearEnd();
  if (!turn.text) say(word("writing"));
  turn.text += piece.text;
  for (const part of tokens.parts(piece)) {
    turn.tokens.push(part);
    tokens.draw(turn.body, part);
  }
  if (follow) toEnd();
}

function finished(turn, { usage, timings, seed }) {
  turn.usage = usage;
  turn.counts = { n: usage.completion_tokens, s: timings.tokens_per_s, f: Math.round(timings.first_token_ms), seed };
  say(counted(turn.counts), true);
}

function send() {
  if (running || !model()) return;
  const said = ask.value;
  const conversation = store.current ?? store.begin(model().id, mode());
  if (conversation.mode === "chat" && !said.trim()) return;
  conversation.model = model().id;
  if (said) conversation.turns.push({ role: "user", text: said });
  ask.value = "";
  fit();
  store.keep();
  write();
}

function again(index) {
  if (running) return;
  store.current.turns.splice(index);
  write();
}

function edit(index, body) {
  if (running || editing) return;
  const turn = store.current.turns[index], box = document.createElement("textarea"), row = document.createElement("p");
  editing = box;
  box.value = turn.text;
  box.setAttribute("aria-label", word("edit"));
  box.rows = Math.min(12, turn.text.split("\n").length + 2);
  row.className = "actions shown";
  const close = () => { editing = null; draw(); ask.focus(); };
  const change = (go) => {
    Object.assign(turn, { text: box.value });
    for (const name of ["tokens", "counts", "usage", "error"]) delete turn[name];
    editing = null;
    if (go) { store.current.turns.splice(index + 1); write(); } else { store.save(); draw(); }
  };
  row.append(button("save", () => change(true)), button("save_text", () => change(false)), button("cancel", close));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) change(true);
  });
  body.replaceChildren(box, row);
  box.focus();
}

// ---- the frame

function fit() {
  ask.style.height = "auto";
  ask.style.height = Math.min(ask.scrollHeight, innerHeight * 0.4) + "px";
  at("send").textContent = word(mode() === "continue" && !ask.value ? "go_on" : "send");
}

function side(open) {
  document.body.classList.toggle("side-open", open);
  at("open-side").setAttribute("aria-expanded", String(open));
}

function settings(open) {
  at("settings").hidden = !open;
  document.body.classList.toggle("settings-open", open);
  at("open-settings").setAttribute("aria-expanded", String(open));
  (open ? at("close-settings") : at("open-settings")).focus();
}

function pickModel(id) {
  if (models.some((one) => one.id === id)) at("model").value = id;
}

function fresh() {
  if (running) return;
  store.choose(null);
  side(false);
  say("");
  draw();
  ask.focus();
}

function look(change) {
  const root = document.documentElement;
  Object.assign(root.dataset, change);
  root.lang = language() ? "zh-Hans" : "en";
  try { localStorage.setItem("dougong.look", JSON.stringify({ theme: root.dataset.theme, lang: root.dataset.lang })); } catch { /* */ }
}

function keys(event) {
  if (event.key === "Escape") {
    if (running) running.abort.abort();
    else if (!at("settings").hidden) settings(false);
    else side(false);
    tokens.hide();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    fresh();
  } else if (event.key === "/" && !event.target.closest("textarea, input")) {
    event.preventDefault();
    ask.focus();
  }
}

function askKeys(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {   // Enter also ends a Chinese input method's word
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !ask.value && store.current && !running) {
    const index = store.current.turns.findLastIndex((turn) => turn.role === "user");
    if (index >= 0) { event.preventDefault(); edit(index, store.current.turns[index].body); }
  }
}

function listen() {
  at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  at("stop").addEventListener("click", () => running?.abort.abort());
  ask.addEventListener("input", fit);
  ask.addEventListener("keydown", askKeys);
  document.addEventListener("keydown", keys);
  at("new").addEventListener("click", fresh);
  at("model").addEventListener("change", () => { if (store.current) store.current.model = model().id; draw(); });
  for (const which of ["chat", "continue"])
    at("mode-" + which).addEventListener("click", () => {
      if (running || !model() || mode() === which) return;
      store.begin(model().id, which);   // what was said stays in the list
      draw();
    });
  at("open-side").addEventListener("click", () => side(!document.body.classList.contains("side-open")));
  at("stage").addEventListener("click", (event) => { if (!event.target.closest("#open-side")) side(false); });
  at("open-settings").addEventListener("click", () => settings(at("settings").hidden));
  at("close-settings").addEventListener("click", () => settings(false));
  at("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    look({ theme: dark ? "light" : "dark" });
  });
  at("language").addEventListener("click", () => { look({ lang: language() ? "en" : "zh" }); words(); });
  turns.addEventListener("pointerover", (event) => {
    if (event.target.matches(".token")) tokens.show(event.target); else tokens.hide();
  });
  talk.addEventListener("pointerleave", tokens.hide);
  talk.addEventListener("scroll", tokens.hide);
  talk.addEventListener("keydown", (event) => tokens.walk(event, say));
}

const redrawPanel = panel(at, () => draw());

function words() {
  spell();
  at("language").textContent = word("language");
  redrawPanel();
  draw();
}

async function start() {
  listen();
  words();
  try {
    models = await api.models();
  } catch (error) {
    say(error.status === 401 ? word("key_needed") : error.message || word("offline"));
  }
  at("model").replaceChildren(...models.map((one) => new Option(one.id, one.id)));
  pickModel(store.current?.model);
  draw();
  fit();
  if (matchMedia("(hover: hover)").matches) ask.focus();
}

start();
