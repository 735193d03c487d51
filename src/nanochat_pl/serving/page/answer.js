// One answer: its text, what can be done with it, its token view.

import { readable, shownVersion } from "./chat.js";
import { copyFrom, el, iconButton } from "./dom.js";
import { isRunning } from "./generate.js";
import { inspector } from "./inspector.js";
import { GrowingText, renderParts } from "./markdown.js";

const number = new Intl.NumberFormat("en");

const ENDINGS = {
  length: "ended at the length limit",
  context: "ended: the model's context is full",
  stopped: "stopped",
};

export class AnswerView {
  #actions;
  #turn;
  #side;
  #growing = null;
  #inspected = false;
  #who = el("h2", { class: "who" });
  #above = el("div", { class: "above" });
  #body = el("div", { class: "body", dir: "auto" });
  #below = el("div", { class: "below" });
  #tokens = el("div", { class: "tokens-slot" });

  constructor(actions, turn, side) {
    this.#actions = actions;
    this.#turn = turn;
    this.#side = side;
    this.node = el("section", { class: "answer" }, this.#who, this.#above, this.#body, this.#below, this.#tokens);
    this.#nameIt();
    const version = this.#version;
    if (version) this.#body.textContent = readable(version.parts); // until it comes near
  }

  get #answer() {
    return this.#turn.answers[this.#side];
  }

  get #version() {
    return shownVersion(this.#answer);
  }

  #nameIt() {
    const model = this.#version?.model ?? this.#answer.model;
    this.#who.textContent = model;
    this.node.setAttribute("aria-label", `Answer of ${model}`);
  }

  /** The version that is chosen, as it is. */
  show() {
    const version = this.#version;
    if (!version) return;
    this.#nameIt();
    this.#closeTokens();
    const running = isRunning(version);
    this.node.classList.toggle("growing", running);
    this.node.setAttribute("aria-busy", String(running));
    this.#showAbove(version);
    if (running) {
      this.#growing = new GrowingText(this.#body);
      this.grow();
      this.#below.replaceChildren();
    } else {
      this.#growing = null;
      renderParts(this.#body, version.parts);
      this.#showBelow(version);
    }
  }

  /** What can be done with it, anew, where it is there. */
  showActions() {
    if (this.#below.childElementCount) this.#showBelow(this.#version);
  }

  /** More of it is there. */
  grow() {
    const version = this.#version;
    if (!this.#growing || !isRunning(version)) return;
    if (version.leftOut && !this.#above.childElementCount) this.#showAbove(version);
    this.#growing.update(version.parts);
  }

  #showAbove({ from, leftOut }) {
    const notes = [];
    if (from?.instead) notes.push(`Continued with “${from.instead}” in place of “${from.token}”.`);
    else if (from) notes.push("Continued.");
    if (leftOut) {
      const what = leftOut === 1 ? "The first message was left out, with its answer" : `The first ${leftOut} messages were left out, with their answers`;
      notes.push(`${what}: the model's context has no room for more.`);
    }
    this.#above.replaceChildren(...notes.map((text) => el("p", { class: "note", text })));
  }

  #showBelow(version) {
    const problem = version.error && el("p", { class: "problem", role: "alert", text: version.error });
    const copy = iconButton("copy", "Copy the answer", () => copyFrom(copy, readable(version.parts)));
    const again = version.error
      ? el("button", { type: "button", class: "quiet-button small", text: "Try again", on: { click: () => this.#actions.regenerate(this.#turn, this.#side) } })
      : iconButton("again", "Generate another answer", () => this.#actions.regenerate(this.#turn, this.#side));
    const buttons = [
      this.#pager(),
      version.parts.length > 0 && copy,
      again,
      version.hasTokens && this.#tokensButton(version),
      ...this.#thumbs(version),
      canGoOn(version) && this.#goOnButton(version),
    ];
    this.#below.replaceChildren(
      ...[problem, el("div", { class: "actions" }, ...buttons, el("span", { class: "facts-line", text: factsOf(version) }))].filter(Boolean),
    );
  }

  #pager() {
    const { versions, shown } = this.#answer;
    if (versions.length < 2) return null;
    const to = (step, label, name) => {
      const target = shown + step;
      const button = iconButton(name, label, () => {
        this.#answer.shown = target;
        this.show();
        this.#actions.save(this.#turn);
        (this.#below.querySelector(`[aria-label="${label}"]:not([disabled])`) ?? this.#below.querySelector("button:not([disabled])"))?.focus();
      });
      button.disabled = target < 0 || target >= versions.length;
      return button;
    };
    return el(
      "span",
      { class: "pager", role: "group", "aria-label": "Answers to this message" },
      to(-1, "Previous answer", "previous"),
      el("span", { class: "count", text: `${shown + 1} / ${versions.length}` }),
      to(1, "Next answer", "next"),
    );
  }

  #tokensButton(version) {
    const toggle = () => this.#toggleTokens(button, version);
    const button = iconButton("tokens", "Tokens and their probabilities", toggle, { "aria-expanded": "false" });
    return button;
  }

  async #toggleTokens(button, version) {
    if (this.#inspected) {
      this.#closeTokens();
      button.setAttribute("aria-expanded", "false");
      return;
    }
    this.#inspected = true;
    button.setAttribute("aria-expanded", "true");
    const view = await inspector(version, (choice) => this.#actions.goOn(this.#turn, this.#side, version, choice));
    if (!this.#inspected || this.#version !== version) return;
    this.#tokens.replaceChildren(view);
  }

  #closeTokens() {
    this.#inspected = false;
    this.#tokens.replaceChildren();
  }

  #goOnButton(version) {
    return el("button", {
      type: "button",
      class: "quiet-button small",
      text: "Continue",
      on: { click: () => this.#actions.goOn(this.#turn, this.#side, version, null) },
    });
  }

  #thumbs(version) {
    if (!this.#actions.takesFeedback() || !version.parts.length) return [];
    const buttons = ["up", "down"].map((rating) => {
      const label = rating === "up" ? "Good answer" : "Bad answer";
      const button = iconButton(rating, label, async () => {
        if (version.rating === null) await this.#actions.rate(this.#turn, this.#side, version, rating);
        mark();
      });
      return [rating, button];
    });
    const mark = () => {
      for (const [rating, button] of buttons) {
        button.setAttribute("aria-pressed", String(version.rating === rating));
        button.setAttribute("aria-disabled", String(version.rating !== null));
      }
    };
    mark();
    return buttons.map(([, button]) => button);
  }
}

/** Where the context is full, more of the oldest messages can be left out, as long as there are any. */
function canGoOn({ finish, hasTokens, canLeaveOutMore }) {
  return hasTokens && (finish === "length" || (finish === "context" && canLeaveOutMore));
}

function factsOf({ usage, seconds, seed, finish, error, parts }) {
  const facts = [];
  if (usage) {
    facts.push(`${number.format(usage.completion_tokens)} tokens`);
    if (seconds > 0) facts.push(`${number.format(Math.round(usage.completion_tokens / seconds))} a second`);
  }
  if (seed !== null) facts.push(`seed ${seed}`);
  if (ENDINGS[finish]) facts.push(ENDINGS[finish]);
  else if (!finish && !error) facts.push("interrupted");
  else if (finish && !parts.length) facts.push("an empty answer");
  return facts.join(" · ");
}
