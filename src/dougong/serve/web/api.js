// The server's own API, as any client uses it.
export class ApiError extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function ask(path, options) {
  let response;
  try { response = await fetch(path, options); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", 0);
  }
  if (response.ok) return response;
  let message = response.statusText;
  try { message = (await response.json()).error.message; } catch { /* no body of ours */ }
  throw new ApiError(message, response.status);
}

export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

function sampling(settings) {
  const asked = { temperature: settings.temperature, max_tokens: settings.max_tokens };
  if (settings.temperature > 0) {
    if (settings.top_p < 1) asked.top_p = settings.top_p;
    if (settings.top_k > 0) asked.top_k = settings.top_k;
    if (settings.min_p > 0) asked.min_p = settings.min_p;
  }
  if (settings.repetition_penalty !== 1) asked.repetition_penalty = settings.repetition_penalty;
  if (settings.seed !== "") asked.seed = Number(settings.seed);
  const stops = settings.stops.split("\n").filter(Boolean).slice(0, 16);
  if (stops.length) asked.stop = stops;
  return asked;
}

export function request(conversation, turns, settings) {
  const asked = { model: conversation.model, ...sampling(settings), stream: true, stream_options: { include_usage: true } };
  if (conversation.mode === "continue") {
    if (settings.inspect) asked.logprobs = 5;
    return ["v1/completions", { ...asked, prompt: turns.map((turn) => turn.text).join(""), truncation: "auto" }];
  }
  if (settings.inspect) Object.assign(asked, { logprobs: true, top_logprobs: 5 });
  const messages = turns.map((turn) => ({ role: turn.role, content: turn.text }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  return ["v1/chat/completions", { ...asked, messages }];
}

// Yields {text, tokens, finish} as they come, and at the end {usage, timings}.
export async function* stream([path, body], signal) {
  const response = await ask(path, { method: "POST", signal, body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "", ended = false;
  while (true) {
    const { value, done } = await reader.read();
    if (done) break;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") { ended = true; continue; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 500);
      for (const choice of chunk.choices) {
        const text = choice.text ?? choice.delta?.content ?? "";
        yield { text, tokens: told(choice.logprobs), finish: choice.finish_reason };
      }
      if (chunk.usage) yield { usage: chunk.usage, timings: chunk.timings, seed: chunk.seed };
    }
  }
  if (!ended) throw new ApiError("", 0);
}

// Both shapes of log-probabilities as [text, logprob, [[text, logprob], …]].
function told(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content)
    return logprobs.content.map((one) => [one.token, one.logprob, one.top_logprobs.map((rival) => [rival.token, rival.logprob])]);
  return logprobs.tokens.map((token, i) => [token, logprobs.token_logprobs[i], Object.entries(logprobs.top_logprobs[i])]);
}
