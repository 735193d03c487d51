// The list of conversations.

import { ask, byId, el, icon, iconButton } from "./dom.js";
import { answeringIds } from "./generate.js";
import { listConversations } from "./chat.js";

const narrow = matchMedia("(max-width: 47.99rem)");

/** A file for the person at the browser. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export class Sidebar {
  #actions;
  #current = null;
  #drawn = 0;

  /** @param actions open(id), create(), remove(id). */
  constructor(actions) {
    this.#actions = actions;
    byId("open-sidebar").append(icon("menu"));
    byId("close-sidebar").append(icon("close"));
    byId("open-sidebar").addEventListener("click", () => this.#slide(true));
    byId("close-sidebar").addEventListener("click", () => this.#slide(false));
    byId("shade").addEventListener("click", () => this.#slide(false));
    document.addEventListener("keydown", (event) => {
      const isOpen = document.body.classList.contains("sidebar-open") && !document.querySelector("dialog[open]");
      if (event.key === "Escape" && isOpen) this.#slide(false);
    });
    byId("new-chat").addEventListener("click", () => {
      this.#slide(false, false);
      actions.create();
    });
    narrow.addEventListener("change", () => this.#slide(false, false));
    this.#slide(false, false);
  }

  /** On a phone it comes over the page. */
  #slide(open, focus = true) {
    document.body.classList.toggle("sidebar-open", open);
    byId("open-sidebar").setAttribute("aria-expanded", String(open));
    byId("shade").hidden = !open;
    byId("sidebar").inert = narrow.matches && !open;
    byId("main").inert = open && narrow.matches;
    if (focus) byId(open ? "close-sidebar" : "open-sidebar").focus();
  }

  async draw(current = this.#current) {
    this.#current = current;
    const number = ++this.#drawn;
    const rows = await listConversations();
    if (number !== this.#drawn) return; // a later call has been quicker
    const answering = answeringIds();
    const hadFocus = document.activeElement?.closest?.("#conversations") !== null;
    byId("conversations").replaceChildren(...rows.map((row) => this.#item(row, answering.has(row.id))));
    if (hadFocus && document.activeElement === document.body) byId("new-chat").focus();
  }

  #item({ id, title }, isAnswering) {
    const name = title || "Untitled";
    const choose = el(
      "button",
      { type: "button", class: "conversation", "aria-current": id === this.#current ? "page" : null },
      el("span", { class: "name", text: name }),
      isAnswering && el("span", { class: "dot", role: "img", "aria-label": "is being answered" }),
    );
    choose.addEventListener("click", () => {
      this.#slide(false, false);
      this.#actions.open(id);
    });
    const remove = iconButton("remove", `Delete “${name}”`, async () => {
      if (await ask(`Delete the conversation “${name}”? It cannot be brought back.`, "Delete")) this.#actions.remove(id);
    });
    return el("li", {}, choose, remove);
  }
}
