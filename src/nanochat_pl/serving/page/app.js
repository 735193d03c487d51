// The page: what belongs to the whole of it, and what its parts do with each other.

import { getInfo, hasKey, sendFeedback, setKey } from "./api.js";
import * as chat from "./chat.js";
import { showCards } from "./card.js";
import { byId, el, icon, isEnter } from "./dom.js";
import { answer, endAt, isAnswering, isRunning, progress, recentTokens, stop } from "./generate.js";
import { isDark, setTheme, Settings } from "./settings.js";
import { download, Sidebar } from "./sidebar.js";
import { openStore, tokensOf } from "./store.js";
import { View } from "./view.js";

const RETRY_SECONDS = 2;
const EXAMPLES = ["Who are you?", "What is 123 * 45?", "How many letters r are in strawberry?", "Why is the sky blue?"];

const settings = new Settings();
const input = byId("input");
let info = null;
let conversation = null;
let asksForKey = false;

const view = new View({
  regenerate(turn, side) {
    generate(turn, side);
    input.focus(); // the button is gone
  },
  async edit(turn, text) {
    if (!maySend(text)) return; // nothing is replaced by what the server would refuse
    stop(conversation);
    if (conversation.turns[0]?.id === turn.id) conversation.title = "";
    await chat.cutAt(conversation, turn);
    view.dropGone();
    send(text);
    input.focus();
  },
  async goOn(turn, side, version, choice) {
    const own = conversation;
    const begun = choice?.begun ?? [...(recentTokens(version) ?? (await tokensOf(version.id)))];
    if (own !== conversation) return;
    const from = choice?.from ?? {};
    if (choice?.ends) await endAt({ conversation, turn, side, begun, from });
    else generate(turn, side, { begun, from });
    input.focus();
  },
  async rate(turn, side, version, rating) {
    const own = conversation;
    const turns = own.turns.slice(0, own.turns.indexOf(turn) + 1);
    version.rating = rating; // at once: a second click is none
    try {
      await sendFeedback({ rating, model: version.model, messages: chat.messagesOf(turns, side) });
    } catch (error) {
      version.rating = null;
      notice(`The rating was not taken: ${error.message}`);
      return;
    }
    save(turn, own);
  },
  save,
  takesFeedback: () => Boolean(info?.feedback),
});

const sidebar = new Sidebar({
  open: (id) => show(id),
  create: () => create(),
  async remove(id) {
    const gone = await chat.openConversation(id);
    if (gone) stop(gone);
    await chat.removeConversation(id);
    if (id === conversation.id) await create();
    else sidebar.draw();
  },
});

function save(turn, of = conversation) {
  chat.save(of, turn).catch(() => unsaved());
}

function unsaved() {
  notice("This browser has no room to keep the conversation: export it before you close the page.");
}

/** Something that everybody should know; null takes it away. */
function notice(text) {
  byId("notice").textContent = text ?? "";
  byId("notice").hidden = !text;
}

function served(models) {
  const known = info.models.map((model) => model.id);
  const kept = models.filter((model) => known.includes(model));
  return kept.length ? kept : [known[0]];
}

function create() {
  const models = conversation?.models ?? (info ? served([]) : []);
  return look(chat.newConversation(models));
}

async function show(id) {
  const found = await chat.openConversation(id);
  return found ? look(found) : create();
}

function look(next) {
  drafts.set(conversation?.id, input.value);
  conversation = next;
  if (info) conversation.models = served(conversation.models);
  history.replaceState(null, "", `#${conversation.id}`);
  view.show(conversation);
  input.value = drafts.get(conversation.id) ?? "";
  fitInput();
  showModels();
  showState();
  if (!matchMedia("(pointer: coarse)").matches) input.focus();
  return sidebar.draw(conversation.id);
}

const drafts = new Map();

function generate(turn, side, more = {}) {
  if (!info || isRunning(chat.shownVersion(turn.answers[side]))) return;
  const known = info.models.map((model) => model.id);
  if (!known.includes(turn.answers[side].model)) turn.answers[side].model = conversation.models[side] ?? known[0];
  answer({ info, settings, conversation, turn, side, ...more });
}

function send(text) {
  const turn = chat.addTurn(conversation, text);
  view.addTurn(turn);
  for (const side of turn.answers.keys()) generate(turn, side);
  byId("title").textContent = conversation.title;
}

/** Whether the server would take a message; where it would not, this is said. */
function maySend(text) {
  if (!info) {
    if (asksForKey) askKey();
    else notice("The server has not said yet which models it has.");
    return false;
  }
  const most = info.limits.message_chars;
  const isShort = text.length <= most;
  notice(isShort ? null : `The message has ${text.length.toLocaleString("en")} characters; ${most.toLocaleString("en")} are allowed.`);
  return isShort;
}

function submit() {
  const text = input.value;
  if (!text.trim() || isAnswering(conversation) || !maySend(text)) return;
  input.value = "";
  fitInput();
  send(text);
}

function showState() {
  const answering = isAnswering(conversation);
  const stopHadFocus = document.activeElement === byId("stop");
  byId("stop").hidden = !answering;
  byId("send").hidden = answering;
  byId("send").disabled = !info || !input.value.trim();
  if (stopHadFocus && !answering) input.focus();
}

function showModels() {
  if (!info) return;
  const [model, other = ""] = conversation.models;
  const options = (ids) => ids.map((id) => el("option", { value: id, text: id }));
  const ids = info.models.map((each) => each.id);
  byId("model").replaceChildren(...options(ids));
  byId("model").value = model;
  byId("compare-box").hidden = ids.length < 2;
  byId("compare").replaceChildren(el("option", { value: "", text: "Compare with …" }), ...options(ids.filter((id) => id !== model)));
  byId("compare").value = other;
  document.body.classList.toggle("comparing", Boolean(other));
  const { stage, parameters } = info.models.find((each) => each.id === model) ?? {};
  byId("hint").textContent = parameters ? `${model}: ${parameters.toLocaleString("en")} parameters, stage ${stage}.` : "";
}

function chooseModels() {
  const [model, other] = [byId("model").value, byId("compare").value];
  conversation.models = other && other !== model ? [model, other] : [model];
  showModels();
}

/** Where the browser does not size the field by what is in it. */
function fitInput() {
  if (!CSS.supports("field-sizing", "content")) {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
  }
}

/** Ask for the API key, and go on with it. */
function askKey() {
  const dialog = byId("key");
  if (dialog.open) return;
  const field = el("input", { id: "key-input", type: "password", autocomplete: "current-password", required: true });
  const form = el(
    "form",
    {},
    el("h2", { id: "key-title", text: "API key" }),
    el("label", { for: "key-input", text: hasKey() ? "The server did not take the key. Its key:" : "This server asks for a key:" }),
    field,
    el("p", { class: "hint", text: "It is kept in this tab until you close it." }),
    el("div", { class: "dialog-buttons" }, el("button", { type: "submit", class: "main-button", text: "Use it" })),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    setKey(field.value.trim());
    dialog.close();
    learn();
  });
  dialog.replaceChildren(form);
  dialog.addEventListener("close", () => info || notice("This server asks for an API key."), { once: true });
  dialog.showModal();
}

/** Ask the server what it has, until it says it. */
async function learn() {
  try {
    const found = await getInfo();
    if (found.models.some((model) => model.depth === undefined)) throw new Error("The model is being loaded …");
    asksForKey = false;
    info = found;
  } catch (error) {
    asksForKey = error.status === 401;
    if (asksForKey) askKey();
    else {
      notice(error.message);
      setTimeout(learn, RETRY_SECONDS * 1000);
    }
    return;
  }
  notice(keeps ? null : "This browser keeps no conversations: they are gone when the page is closed.");
  settings.learn(info);
  conversation.models = served(conversation.models);
  showModels();
  showState();
  view.showActions(); // those of feedback were not known before
}

function exportName() {
  return `conversations-${new Date().toISOString().slice(0, 10)}.jsonl`;
}

function listen() {
  for (const [id, name] of [["open-card", "info"], ["open-settings", "settings"], ["theme", "theme"], ["send", "send"], ["stop", "stop"], ["export-one", "save"]]) {
    byId(id).append(icon(name));
  }
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  input.addEventListener("keydown", (event) => {
    if (isEnter(event)) {
      event.preventDefault();
      submit();
    }
  });
  input.addEventListener("input", () => {
    fitInput();
    byId("send").disabled = !info || !input.value.trim();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop(conversation);
  });
  byId("stop").addEventListener("click", () => stop(conversation));
  byId("model").addEventListener("change", chooseModels);
  byId("compare").addEventListener("change", chooseModels);
  byId("open-card").addEventListener("click", () => info && showCards(info));
  byId("open-settings").addEventListener("click", () => {
    const change = el("button", { type: "button", class: "quiet-button", text: "Change the API key" });
    change.addEventListener("click", () => {
      byId("settings").close();
      askKey();
    });
    if (info) settings.show(hasKey() ? change : null);
  });
  byId("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  const showTheme = () => byId("theme").setAttribute("aria-pressed", String(isDark()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  showTheme();
  byId("export-all").addEventListener("click", async () => download(exportName(), await chat.exportAll()));
  byId("export-one").addEventListener("click", () => download(exportName(), chat.exportLines(conversation)));
  byId("examples").append(
    ...EXAMPLES.map((text) => {
      const button = el("button", { type: "button", class: "example", text });
      button.addEventListener("click", () => {
        input.value = text;
        submit();
        input.focus();
      });
      return el("li", {}, button);
    }),
  );
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the fragment of the address is the conversation
    input.focus();
  });
  window.addEventListener("hashchange", () => location.hash.slice(1) !== conversation.id && show(location.hash.slice(1)));
  progress.addEventListener("unsaved", unsaved);
  chat.onOtherTab(async (id) => {
    const isThere = await chat.refresh(id, isRunning);
    if (id === conversation.id) {
      if (isThere) view.show(conversation);
      else await create();
    }
    sidebar.draw();
  });
  for (const kind of ["begin", "end"]) {
    progress.addEventListener(kind, ({ detail }) => {
      showState();
      sidebar.draw();
      if (kind === "end" && detail.version.status === 401) askKey();
    });
  }
}

listen();
const keeps = await openStore();
await show(location.hash.slice(1));
learn();
