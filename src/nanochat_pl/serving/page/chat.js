// Conversations. One is {id, title, created, updated, models}, with one model, or two that are compared; its turns are
//   {id, conversation, position, user, answers: [{model, shown, versions}]}
// with an answer of each model. A version of an answer is what was generated at one time:
//   {id, model, parts, finish, error, seed, usage, seconds, rating, leftOut, canLeaveOutMore, from, hasTokens}
// Its parts are those of the server's chat format, {type: "text" | "python" | "python_output", text}.

import { newId } from "./dom.js";
import * as store from "./store.js";

/** What was read of conversations, and those that are being answered: a stream goes on where none looks. */
const open = new Map();

/** The tabs of this browser tell each other which conversation they have written. */
const tabs = new BroadcastChannel("nanochat_pl");
export const onOtherTab = (listen) => tabs.addEventListener("message", ({ data }) => listen(data));
let writes = 0; // of this tab

export function newConversation(models) {
  const now = Date.now();
  const conversation = { id: newId(), title: "", created: now, updated: now, models, turns: [] };
  open.set(conversation.id, conversation);
  return conversation;
}

/** A conversation with its turns, or null. */
export async function openConversation(id) {
  if (open.has(id)) return open.get(id);
  const row = (await store.allConversations()).find((each) => each.id === id);
  if (!row) return null;
  const turns = await store.turnsOf(id);
  if (!open.has(id)) open.set(id, { ...row, turns });
  return open.get(id);
}

export async function listConversations() {
  const rows = await store.allConversations();
  const stored = new Set(rows.map((row) => row.id));
  const unstored = [...open.values()].filter((each) => !stored.has(each.id) && each.turns.length);
  return [...rows, ...unstored].sort((a, b) => b.updated - a.updated);
}

/**
 * Take in what another tab has written of a conversation, so that nothing old is written over it. Answers in the making
 * stay as they are here. Returns whether the conversation is still there.
 */
export async function refresh(id, isRunning) {
  const conversation = open.get(id);
  if (!conversation) return false;
  let row, stored, before;
  do {
    before = writes;
    row = (await store.allConversations()).find((each) => each.id === id);
    stored = await store.turnsOf(id);
  } while (before !== writes);
  if (!row) {
    open.delete(id);
    return false;
  }
  const { title, updated } = row;
  const known = new Map(conversation.turns.map((turn) => [turn.id, turn]));
  const turns = stored.map((turn) => joined(known.get(turn.id), turn, isRunning));
  Object.assign(conversation, { title, updated, turns });
  return true;
}

/** A turn as it is stored; where it is being answered here, as it is here, with the versions that others have added. */
function joined(turn, stored, isRunning) {
  if (!turn?.answers.some(({ versions }) => versions.some(isRunning))) return stored;
  for (const [side, { versions }] of turn.answers.entries()) {
    for (const other of stored.answers[side]?.versions ?? []) {
      const index = versions.findIndex((each) => each.id === other.id);
      if (index < 0) versions.push(other);
      else if (!isRunning(versions[index])) versions[index] = other;
    }
  }
  return turn;
}

export async function removeConversation(id) {
  open.delete(id);
  await store.deleteConversation(id);
  tabs.postMessage(id);
}

/**
 * Write what has changed: the row of the conversation, and of one turn. Returns false where that is gone.
 *
 * @param isPart whether more is about to follow: other tabs are told of the whole only.
 */
export async function save(conversation, turn, isPart = false) {
  const { turns, ...row } = conversation;
  if (!open.has(conversation.id) || !turns.includes(turn)) return false; // removed while it was answered
  writes += 1;
  await store.putTurn(turn);
  await store.putConversation(row);
  if (!isPart) tabs.postMessage(conversation.id);
  return true;
}

export function addTurn(conversation, text) {
  const turn = {
    id: newId(),
    conversation: conversation.id,
    position: (conversation.turns.at(-1)?.position ?? -1) + 1,
    user: text,
    answers: conversation.models.map((model) => ({ model, shown: 0, versions: [] })),
  };
  conversation.turns.push(turn);
  conversation.updated = Date.now();
  if (!conversation.title) conversation.title = text.trim().replace(/\s+/g, " ").slice(0, 80);
  return turn;
}

/** Take out a turn and all behind it. */
export async function cutAt(conversation, turn) {
  const at = conversation.turns.findIndex((each) => each.id === turn.id); // another tab may have written it anew
  const gone = at < 0 ? [] : conversation.turns.splice(at);
  writes += 1;
  await store.deleteTurns(gone);
  tabs.postMessage(conversation.id);
}

export function addVersion(turn, side, fields = {}) {
  const answer = turn.answers[side];
  answer.versions.push({
    id: newId(),
    model: answer.model,
    parts: [],
    finish: null,
    error: null,
    seed: null,
    usage: null,
    seconds: 0,
    rating: null,
    leftOut: 0,
    canLeaveOutMore: false,
    from: null,
    hasTokens: false,
    ...fields,
  });
  answer.shown = answer.versions.length - 1;
  return answer.versions.at(-1);
}

export const shownVersion = (answer) => answer?.versions[answer.shown];

/** Add to the parts what a piece of a stream brings. */
export function addPiece(parts, text, tools) {
  for (const tool of tools ?? []) {
    parts.push({ type: tool.type === "tool_call" ? "python" : "python_output", text: tool.text });
  }
  if (!text) return;
  if (parts.at(-1)?.type === "text") parts.at(-1).text += text;
  else parts.push({ type: "text", text });
}

/** The text without what the calculator did. */
export const textOf = (parts) => parts.filter((part) => part.type === "text").map((part) => part.text).join("");

/** All of an answer as one line of text: a tool call as expression = result. */
export function readable(parts) {
  return segments(parts)
    .map((each) => (each.type === "text" ? each.text : `[${each.expression} = ${each.result ?? "?"}]`))
    .join("");
}

/** Texts and tool calls: {type: "text", text}, {type: "tool", expression, result}; the result is null until it is there. */
export function segments(parts) {
  const found = [];
  for (const part of parts) {
    const last = found.at(-1);
    if (part.type === "text") found.push({ type: "text", text: part.text });
    else if (part.type === "python") found.push({ type: "tool", expression: part.text, result: null });
    else if (last?.type === "tool" && last.result === null) last.result = part.text;
    else found.push({ type: "tool", expression: "", result: part.text });
  }
  return found;
}

const MARKERS = { "<|python_start|>": "python", "<|output_start|>": "python_output" };
const ENDS = { "<|python_end|>": "python", "<|output_end|>": "python_output" };

/** The parts that tokens make, as the server's parse_assistant has them. */
export function partsOfTokens(tokens) {
  const parts = [];
  let kind = "text";
  let bytes = [];
  const finish = () => {
    if (bytes.length || kind !== "text") parts.push({ type: kind, text: new TextDecoder().decode(new Uint8Array(bytes)) });
    bytes = [];
  };
  for (const token of tokens) {
    if (!token.special) bytes.push(...token.bytes);
    else if (token.special === "<|assistant_end|>") break;
    else if (token.special in MARKERS || ENDS[token.special] === kind) {
      finish();
      kind = MARKERS[token.special] ?? "text";
    }
  }
  finish();
  return parts;
}

const content = (parts) => (parts.some((part) => part.type !== "text") ? parts : textOf(parts));

/** The messages of one side, in the conversations format, with the turns that have an answer. */
export function messagesOf(turns, side) {
  const messages = [];
  for (const turn of turns) {
    const version = shownVersion(turn.answers[side] ?? turn.answers[0]);
    if (!version?.parts.length) continue; // an answer that failed at its first token teaches nobody anything
    messages.push({ role: "user", content: turn.user }, { role: "assistant", content: content(version.parts) });
  }
  return messages;
}

/** What the server is sent: all that was said before a turn, and its message. */
export function requestMessages(conversation, turn, side, leftOut) {
  const before = conversation.turns.slice(leftOut, conversation.turns.indexOf(turn));
  const messages = messagesOf(before, side).map((message) =>
    typeof message.content === "string"
      ? message
      : { role: message.role, content: textOf(message.content), nanochat: { parts: message.content } },
  );
  return [...messages, { role: "user", content: turn.user }];
}

/** Lines of JSON as mixture.tasks.conversations.NAME.path takes them; a comparison gives one for each model. */
export function exportLines(conversation) {
  const sides = Math.max(1, ...conversation.turns.map((turn) => turn.answers.length));
  return Array.from({ length: sides }, (_, side) => messagesOf(conversation.turns, side))
    .filter((messages) => messages.length)
    .map((messages) => `${JSON.stringify({ messages })}\n`)
    .join("");
}

export async function exportAll() {
  const rows = await listConversations();
  const all = await Promise.all(rows.map(async (row) => open.get(row.id) ?? { ...row, turns: await store.turnsOf(row.id) }));
  return all.map(exportLines).join("");
}
