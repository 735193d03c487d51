// Settings of this browser: how answers are drawn, the theme. What is not set here is as the server has it.

import { byId, el } from "./dom.js";

const KEY = "nanochat_pl.settings";
const THEME = "nanochat_pl.theme";

export class Settings {
  #set;
  #defaults = { use_tools: true, record: true };
  #info;

  constructor() {
    try {
      this.#set = JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      this.#set = {};
    }
  }

  /** Defaults and limits of the server. */
  learn(info) {
    this.#info = info;
    this.#defaults = { ...info.sampling, use_tools: true, record: true };
  }

  get(name) {
    return this.#set[name] ?? this.#defaults[name];
  }

  put(name, value) {
    if (value === null || value === this.#defaults[name]) delete this.#set[name];
    else this.#set[name] = value;
    this.#write();
  }

  reset() {
    this.#set = {};
    this.#write();
  }

  #write() {
    try {
      localStorage.setItem(KEY, JSON.stringify(this.#set));
    } catch {
      // Storage is blocked: they hold for as long as the page.
    }
  }

  /** Fields of a request. */
  request() {
    const asked = {};
    for (const name of ["temperature", "top_k", "top_p", "seed", "use_tools"]) {
      if (this.#set[name] !== undefined) asked[name] = this.#set[name];
    }
    if (this.#set.max_tokens !== undefined) asked.max_completion_tokens = this.#set.max_tokens;
    return asked;
  }

  /** What can be set: name, label, explanation, and the attributes of its field. */
  #fields() {
    const { limits } = this.#info;
    return [
      ["temperature", "Temperature", "0 takes the most likely token; above, chance grows.", { type: "range", min: 0, max: Math.min(2, limits.temperature), step: 0.05 }],
      ["top_k", "Top-k", "Only the k most likely tokens can be drawn; 0: all.", { type: "number", min: 0, max: limits.top_k, step: 1 }],
      ["top_p", "Top-p", "Only the most likely tokens with this probability together.", { type: "range", min: 0.01, max: 1, step: 0.01 }],
      ["max_tokens", "Length", "New tokens of an answer, at most.", { type: "number", min: 1, max: limits.max_tokens, step: 1 }],
      ["seed", "Seed", "The same seed gives the same answer to the same conversation. Empty: a new one each time.", { type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, placeholder: "random" }],
      ["use_tools", "Calculator", "Results of the model's expressions are put into its answer.", { type: "checkbox" }],
      ["record", "Keep tokens", "Probabilities and alternatives of every token are kept in this browser, for the token view.", { type: "checkbox" }],
    ];
  }

  #field([name, label, doc, attributes]) {
    const id = `setting-${name}`;
    const input = el("input", { id, ...attributes, "aria-describedby": `${id}-doc` });
    const shown = el("output", { for: id, class: "value" });
    const problem = el("span", { class: "problem", role: "alert" });
    const value = this.get(name);
    if (attributes.type === "checkbox") input.checked = value;
    else input.value = value ?? "";
    const show = () => {
      shown.textContent = attributes.type === "range" ? input.value : "";
    };
    show();
    input.addEventListener("input", () => {
      show();
      problem.textContent = input.checkValidity() ? "" : input.validationMessage;
      input.toggleAttribute("aria-invalid", !input.checkValidity());
    });
    // Not at each key: the first digits of a number are another number.
    input.addEventListener(attributes.type === "range" ? "input" : "change", () => {
      if (!input.checkValidity()) return;
      if (attributes.type === "checkbox") this.put(name, input.checked);
      else this.put(name, input.value === "" ? null : Number(input.value));
    });
    return el(
      "div",
      { class: `setting ${attributes.type}` },
      el("label", { for: id, text: label }),
      shown,
      input,
      el("p", { id: `${id}-doc`, class: "hint", text: doc }),
      problem,
    );
  }

  /** Open the dialog. `keyButton`: what asks for another API key, or null. */
  show(keyButton) {
    const dialog = byId("settings");
    const theme = el("select", { id: "setting-theme", on: { change: () => setTheme(theme.value) } });
    for (const [value, text] of [["", "As the system"], ["light", "Light"], ["dark", "Dark"]]) {
      theme.append(el("option", { value, text }));
    }
    theme.value = document.documentElement.dataset.theme ?? "";
    dialog.replaceChildren(
      el("h2", { id: "settings-title", text: "Settings" }),
      ...this.#fields().map((field) => this.#field(field)),
      el("div", { class: "setting" }, el("label", { for: "setting-theme", text: "Theme" }), theme),
      el(
        "div",
        { class: "dialog-buttons" },
        keyButton,
        el("button", {
          type: "button",
          class: "quiet-button",
          text: "Defaults",
          on: {
            click: () => {
              this.reset();
              dialog.close();
              this.show(keyButton);
            },
          },
        }),
        el("button", { type: "button", class: "main-button", text: "Done", on: { click: () => dialog.close() } }),
      ),
    );
    dialog.showModal();
  }
}

export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** "light", "dark", or "" for the system's. */
export function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  try {
    if (theme) localStorage.setItem(THEME, theme);
    else localStorage.removeItem(THEME);
  } catch {
    // Storage is blocked.
  }
  byId("theme").setAttribute("aria-pressed", String(isDark()));
}
