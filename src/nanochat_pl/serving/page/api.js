// The server's API: what can be had, answers as they are generated, errors.

const KEY = "nanochat_pl.key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** The API key lives as long as the tab. */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

async function call(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", { code: "unreachable" });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Something between the server and here has answered.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(error.message ?? `The server answered with status ${response.status}.`, {
    status: response.status,
    code: error.code ?? null,
    retryAfter,
  });
}

/** Models with their cards, defaults, limits. */
export async function getInfo() {
  return (await call("/info")).json();
}

export async function sendFeedback(body) {
  await call("/feedback", body);
}

/** The chunks of an answer, as objects. Throws ApiError, in the midst of the answer too. */
export async function* streamChat(body, signal) {
  const response = await call("/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const data of eventsOf(response.body)) {
    if (data.startsWith("[DONE]")) return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { code: chunk.error.code });
    yield chunk;
  }
  throw new ApiError("The connection broke off before the end of the answer.", { code: "broken" });
}

/** What stands in the data lines of a stream of server-sent events. */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      let found;
      try {
        found = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke off.", { code: "broken" });
      }
      if (found.done) return;
      const pieces = (rest + found.value).split("\n");
      rest = pieces.pop();
      for (const piece of pieces) {
        const line = piece.endsWith("\r") ? piece.slice(0, -1) : piece;
        if (line.startsWith("data:")) lines.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
