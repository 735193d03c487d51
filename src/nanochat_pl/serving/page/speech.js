// What screen readers are told: answers by sentences, not by tokens.

import { byId, el } from "./dom.js";

const KEPT = 30;

// Marks of Markdown that nobody wants to hear; * and _ alone may be what is talked about.
const MARKS = /\*\*|`+|^#+\s+|^>\s+|^\|?[-:|\s]+\|?$/gm;

/** Returns the line, which the caller may remove when it is no longer true; null where there is nothing to say. */
export function say(text) {
  const spoken = text.replace(MARKS, "").trim();
  if (!spoken) return null;
  const log = byId("log");
  const line = el("p", { text: spoken });
  log.append(line);
  while (log.childElementCount > KEPT) log.firstElementChild.remove();
  return line;
}

/** Collects text, and says it sentence by sentence. */
export class Sentences {
  #rest = "";

  add(text) {
    this.#rest += text;
    const ends = [...this.#rest.matchAll(/[.!?…:]["')\]]*\s+|\n+/g)];
    if (!ends.length) return;
    const end = ends.at(-1).index + ends.at(-1)[0].length;
    say(this.#rest.slice(0, end));
    this.#rest = this.#rest.slice(end);
  }

  end() {
    say(this.#rest);
    this.#rest = "";
  }
}
