// What this browser keeps: conversations and settings. Nothing of it is sent anywhere but as a prompt.
const PLACE = "dougong.chat";
export const DEFAULTS = { temperature: 0.8, top_p: 0.95, top_k: 0, min_p: 0, max_tokens: 200, repetition_penalty: 1, seed: "",
  stops: "", system: "", inspect: true, shade: false };

const kept = read();
export const settings = { ...DEFAULTS, ...kept.settings };
export const conversations = kept.conversations || [];
export let current = conversations.find((one) => one.id === kept.current) || null;

function read() {
  try { return JSON.parse(localStorage.getItem(PLACE)) || {}; } catch { return {}; }
}

// When the browser's store is full, the oldest replies lose their probabilities first, then old conversations go.
export function save() {
  for (let tries = 0; tries < 50; tries++) {
    try {
      localStorage.setItem(PLACE, JSON.stringify({ settings, conversations, current: current && current.id },
        (key, value) => key === "body" ? undefined : value));   // `body` is a turn's place on the page
      return;
    } catch (error) {
      if (error.name !== "QuotaExceededError") return;
      const heavy = [...conversations].reverse().flatMap((one) => one.turns).find((turn) => turn.tokens);
      if (heavy) delete heavy.tokens;
      else if (conversations.length > 1) conversations.pop();
      else return;
    }
  }
}

export function begin(model, mode) {
  current = { id: Date.now().toString(36) + Math.random().toString(36).slice(2, 6), model, mode, turns: [] };
  return current;
}

// A conversation is listed once something was said in it; the newest stands first.
export function keep() {
  const at = conversations.indexOf(current);
  if (at > 0) conversations.splice(at, 1);
  if (at !== 0) conversations.unshift(current);
  save();
}

export function choose(conversation) {
  current = conversation;
  save();
}

export function drop(conversation) {
  const at = conversations.indexOf(conversation);
  if (at >= 0) conversations.splice(at, 1);
  if (current === conversation) current = null;
  save();
}

export const text = (turn) => turn.text;

export function title(conversation) {
  const first = conversation.turns.map(text).find((said) => said.trim());
  return first ? first.trim().replace(/\s+/g, " ").slice(0, 60) : null;
}
