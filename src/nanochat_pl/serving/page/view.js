// The messages of the conversation that is looked at.

import { AnswerView } from "./answer.js";
import { textOf } from "./chat.js";
import { byId, copyFrom, el, iconButton, isEnter } from "./dom.js";
import { progress } from "./generate.js";
import { say, Sentences } from "./speech.js";

const NEAR_END = 80; // pixels: who is so near follows what is added

export class View {
  #actions;
  #conversation = null;
  #turns = new Map(); // by id: {node, answers}
  #changed = new Set(); // answers that have grown since the last frame
  #frame = 0;
  #follows = true;
  #isStale = false; // what is shown, because a message is being edited
  #sentences = new Sentences();
  #answering = new Map(); // what was said of versions that are being generated
  #scroller = byId("scroller");
  #list = byId("turns");
  // Old messages are plain text until they come near: a long conversation is there at once.
  #near = new IntersectionObserver((entries) => this.#approach(entries), { root: byId("scroller"), rootMargin: "1200px 0px" });

  /** @param actions what can be done with messages: regenerate, edit, goOn, rate, save. */
  constructor(actions) {
    this.#actions = actions;
    this.#scroller.addEventListener("scroll", () => this.#noteScroll(), { passive: true });
    byId("to-end").addEventListener("click", () => {
      this.toEnd();
      byId("input").focus();
    });
    new ResizeObserver(() => this.#keepEnd()).observe(this.#list);
    new ResizeObserver(() => this.#keepEnd()).observe(this.#scroller);
    for (const kind of ["begin", "piece", "end"]) {
      progress.addEventListener(kind, ({ detail }) => {
        if (detail.conversation === this.#conversation) this[`_${kind}`](detail);
      });
    }
  }

  /** Show a conversation; the same one, which has changed, where it is: as soon as no message is edited any more. */
  show(conversation) {
    const isSame = conversation === this.#conversation;
    this.#isStale = isSame && this.#isEditing;
    if (this.#isStale) return;
    const keeps = isSame && !this.#follows ? this.#scroller.scrollTop : null;
    this.#conversation = conversation;
    this.#near.disconnect();
    this.#turns.clear();
    this.#changed.clear();
    this.#sentences = new Sentences();
    for (const version of this.#answering.keys()) this.#takeBack(version);
    this.#list.replaceChildren(...conversation.turns.map((turn) => this.#turnNode(turn)));
    byId("title").textContent = conversation.title || "New conversation";
    this.#noteEmpty();
    if (keeps === null) this.toEnd();
    else this.#scroller.scrollTop = keeps;
  }

  /** What can be done with answers is not what it was. */
  showActions() {
    for (const { answers } of this.#turns.values()) for (const answer of answers) answer.showActions();
  }

  get #isEditing() {
    return this.#list.querySelector(".edit-form") !== null;
  }

  addTurn(turn) {
    this.#list.append(this.#turnNode(turn));
    this.#noteEmpty();
    this.toEnd();
  }

  /** The turns are others than those that are shown: show those that are left. */
  dropGone() {
    const left = new Set(this.#conversation.turns.map((turn) => turn.id));
    for (const [id, { node }] of this.#turns) {
      if (left.has(id)) continue;
      node.remove();
      this.#turns.delete(id);
    }
    this.#noteEmpty();
    if (this.#isStale) this.show(this.#conversation);
  }

  toEnd() {
    this.#follows = true;
    this.#keepEnd();
    byId("to-end").hidden = true;
  }

  _begin({ turn, side, version }) {
    this.#turns.get(turn.id)?.answers[side]?.show();
    if (side === 0) this.#sentences = new Sentences();
    if (version.parts.length === 0) this.#answering.set(version, say(`${version.model} is answering.`));
    if (this.#conversation.turns.at(-1) === turn) this.toEnd();
  }

  _piece({ turn, side, text }) {
    const answer = this.#turns.get(turn.id)?.answers[side];
    if (!answer) return;
    this.#changed.add(answer);
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#draw());
    if (side === 0) this.#sentences.add(text);
  }

  _end({ turn, side, version }) {
    this.#takeBack(version);
    const answer = this.#turns.get(turn.id)?.answers[side];
    if (!answer) return;
    this.#changed.delete(answer);
    answer.show();
    if (side === 0) this.#sentences.end();
    else say(`${version.model}: ${textOf(version.parts)}`);
    if (version.error) say(`Error: ${version.error}`);
  }

  /** It is not answering any more, or not here: the log must not go on saying so. */
  #takeBack(version) {
    this.#answering.get(version)?.remove();
    this.#answering.delete(version);
  }

  #draw() {
    this.#frame = 0;
    for (const answer of this.#changed) answer.grow();
    this.#changed.clear();
  }

  #turnNode(turn) {
    const answers = turn.answers.map((_, side) => new AnswerView(this.#actions, turn, side));
    const bubble = el("p", { class: "bubble", dir: "auto", text: turn.user });
    const mine = el("section", { class: "mine", "aria-label": "You" }, el("h2", { class: "visually-hidden", text: "You" }), bubble);
    const node = el(
      "article",
      { class: "turn", data: { id: turn.id } },
      mine,
      el("div", { class: answers.length > 1 ? "answers two" : "answers" }, ...answers.map((answer) => answer.node)),
    );
    this.#turns.set(turn.id, { node, answers, mine });
    this.#near.observe(node);
    return node;
  }

  #approach(entries) {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      this.#near.unobserve(entry.target);
      const turn = this.#conversation.turns.find((each) => each.id === entry.target.dataset.id);
      const shown = this.#turns.get(entry.target.dataset.id);
      if (!turn || !shown) continue;
      for (const answer of shown.answers) answer.show();
      shown.mine.append(this.#ownActions(turn, shown));
    }
  }

  #ownActions(turn, shown) {
    const copy = iconButton("copy", "Copy the message", () => copyFrom(copy, turn.user));
    return el("div", { class: "actions" }, copy, iconButton("edit", "Edit the message", () => this.#edit(turn, shown)));
  }

  #edit(turn, { mine }) {
    const id = `edit-${turn.id}`;
    const input = el("textarea", { id, class: "edit", dir: "auto", rows: "3" });
    input.value = turn.user;
    const before = [...mine.childNodes];
    const leave = () => {
      mine.replaceChildren(...before);
      if (this.#isStale) this.show(this.#conversation);
      mine.querySelector(".actions button:last-child")?.focus();
    };
    const agree = () => {
      if (input.value.trim()) this.#actions.edit(turn, input.value);
    };
    const later = this.#conversation.turns.at(-1) !== turn;
    const form = el(
      "div",
      { class: "edit-form" },
      el("label", { class: "visually-hidden", for: id, text: "Edit the message" }),
      input,
      el("p", { class: "hint", text: later ? "The answer and all messages after it are replaced." : "The answer is replaced." }),
      el(
        "div",
        { class: "dialog-buttons" },
        el("button", { type: "button", class: "quiet-button", text: "Cancel", on: { click: leave } }),
        el("button", { type: "button", class: "main-button", text: "Send", on: { click: agree } }),
      ),
    );
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave();
      } else if (isEnter(event) && event.target === input) {
        event.preventDefault();
        agree();
      }
    });
    mine.replaceChildren(before[0], form);
    input.focus();
    form.scrollIntoView({ block: "nearest" }); // and not the turn, which may be higher than what is seen
  }

  #noteEmpty() {
    byId("empty").hidden = this.#conversation.turns.length > 0;
  }

  #noteScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.#scroller;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
    byId("to-end").hidden = this.#follows;
  }

  #keepEnd() {
    const edits = document.activeElement?.closest(".edit-form"); // it would go out of sight
    if (this.#follows && !edits) this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }
}
