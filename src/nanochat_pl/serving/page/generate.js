// Answers in the making. They go on whichever conversation is looked at; who wants to see them listens to `progress`.

import { streamChat } from "./api.js";
import { addPiece, addVersion, partsOfTokens, requestMessages, save } from "./chat.js";
import { putTokens } from "./store.js";

export const TOP_LOGPROBS = 8;
const SECONDS_BETWEEN_SAVES = 2; // of an answer that is being generated: so much is lost if the page ends then
const CHARS_PER_TOKEN = 3; // until the first answer tells
const RECENT = 20; // answers whose tokens stay in memory

/** Events "begin", "piece" and "end", each with detail {conversation, turn, side, version, text}. */
export const progress = new EventTarget();

const running = new Map(); // by version
const ratios = new Map(); // characters of a token, by model

export const isRunning = (version) => running.has(version?.id);

/** The tokens of an answer that is being generated, or was among the last ones; those of others are stored. */
const recent = new Map();
export const recentTokens = (version) => recent.get(version.id);

export function stop(conversation) {
  for (const job of running.values()) if (job.conversation === conversation) job.controller.abort();
}

export const isAnswering = (conversation) => [...running.values()].some((job) => job.conversation === conversation);

export const answeringIds = () => new Set([...running.values()].map((job) => job.conversation.id));

// Leaving the page stops its answers: the broken connections would be shown as errors.
window.addEventListener("pagehide", () => {
  for (const { conversation, turn, version, controller } of running.values()) {
    version.finish = "stopped";
    save(conversation, turn).catch(() => {});
    controller.abort();
  }
});

function tell(kind, job, text = "") {
  const { conversation, turn, side, version } = job;
  progress.dispatchEvent(new CustomEvent(kind, { detail: { conversation, turn, side, version, text } }));
}

/**
 * Generate an answer to a turn.
 *
 * @param begun tokens that it begins with, where another answer is continued.
 * @param from what is said of that, {token, instead}.
 */
export async function answer({ info, settings, conversation, turn, side, begun = [], from = null }) {
  const version = addVersion(turn, side, { from });
  const job = { conversation, turn, side, version, controller: new AbortController(), tokens: [...begun] };
  running.set(version.id, job);
  recent.set(version.id, job.tokens);
  save(conversation, turn).catch(() => progress.dispatchEvent(new CustomEvent("unsaved")));
  tell("begin", job);
  const began = performance.now();
  let savedAt = began;
  try {
    for await (const chunk of chunksOf(job, info, settings, begun)) {
      const text = take(job, chunk);
      version.seconds = (performance.now() - began) / 1000;
      tell("piece", job, text);
      if (performance.now() - savedAt > SECONDS_BETWEEN_SAVES * 1000) {
        savedAt = performance.now();
        save(conversation, turn, true).catch(() => {});
      }
    }
  } catch (error) {
    if (job.controller.signal.aborted) version.finish = "stopped"; // where the page is left, the error may be the connection's
    else {
      version.error = error.message;
      version.status = error.status ?? 0;
    }
  }
  running.delete(version.id);
  version.hasTokens = job.tokens.length > 0;
  conversation.updated = Date.now();
  await keep(job);
  tell("end", job);
}

async function keep({ conversation, turn, version, tokens }) {
  try {
    const isThere = await save(conversation, turn);
    if (isThere && tokens.length) await putTokens({ id: version.id, conversation: conversation.id, tokens });
    while (recent.size > RECENT) recent.delete(recent.keys().next().value);
  } catch {
    progress.dispatchEvent(new CustomEvent("unsaved"));
  }
}

/** Take a chunk in; returns the text that it brings. */
function take(job, chunk) {
  const { version, tokens } = job;
  if (chunk.usage) {
    version.usage = chunk.usage;
    version.seed = chunk.nanochat?.seed ?? null;
    ratios.set(version.model, Math.max(0.2, job.chars / Math.max(1, chunk.usage.prompt_tokens)));
  }
  const choice = chunk.choices[0];
  if (!choice) return "";
  const { content = "", nanochat = {} } = choice.delta;
  addPiece(version.parts, content, nanochat.tools);
  for (const { id, text, bytes, special, logprob, forced, top } of nanochat.tokens ?? []) {
    tokens.push({ id, text, bytes, special, logprob, forced, top });
  }
  if (nanochat.parts) version.parts = nanochat.parts; // whole, and in the order in which it was generated
  version.finish ??= nanochat.finish ?? choice.finish_reason; // the server's own word, which comes first, says more
  return content;
}

/** The chunks; the oldest turns are left out where the model's context, or the limits, have no room for them. */
async function* chunksOf(job, info, settings, begun) {
  const { conversation, turn, side, version, controller } = job;
  const card = info.models.find((each) => each.id === version.model) ?? {};
  const turnsBefore = conversation.turns.indexOf(turn);
  const asked = { ...settings.request(), model: version.model };
  if (settings.get("record")) Object.assign(asked, { return_token_details: true, top_logprobs: TOP_LOGPROBS });
  if (begun.length) asked.answer_ids = begun.map((token) => token.id);
  const room = card.max_context - Math.min(asked.max_completion_tokens ?? info.sampling.max_tokens, card.max_context / 4);
  const perToken = ratios.get(version.model) ?? CHARS_PER_TOKEN;
  let { leftOut } = version;
  for (;;) {
    let messages = requestMessages(conversation, turn, side, leftOut);
    while (leftOut < turnsBefore && !fits(messages, info.limits, perToken * (room - begun.length))) {
      leftOut += Math.max(1, Math.floor((turnsBefore - leftOut) / 16));
      messages = requestMessages(conversation, turn, side, leftOut);
    }
    version.leftOut = leftOut;
    version.canLeaveOutMore = leftOut < turnsBefore;
    job.chars = charsOf(messages);
    try {
      yield* streamChat({ ...asked, messages }, controller.signal);
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || leftOut >= turnsBefore) throw error;
      leftOut += Math.ceil((turnsBefore - leftOut) / 4);
    }
  }
}

const charsOf = (messages) => messages.reduce((sum, message) => sum + message.content.length + 8, 0);

function fits(messages, limits, chars) {
  if (messages.length > limits.messages || (chars > 0 && charsOf(messages) > chars)) return false;
  const sent = messages.reduce((sum, message) => sum + JSON.stringify(message.nanochat?.parts ?? message.content).length, 0);
  return sent < 0.95 * limits.total_chars;
}

/** An answer that ends with an alternative that is an end: nothing has to be generated for it. */
export async function endAt({ conversation, turn, side, begun, from }) {
  const version = addVersion(turn, side, { from, parts: partsOfTokens(begun), finish: "stop", hasTokens: true });
  const job = { conversation, turn, side, version, tokens: begun };
  recent.set(version.id, begun);
  await keep(job);
  tell("begin", job);
  tell("end", job);
}
