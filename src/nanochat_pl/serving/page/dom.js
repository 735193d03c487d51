// Elements and icons without HTML text.

const SVG = "http://www.w3.org/2000/svg";

// Strokes on a grid of 24 by 24.
const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  settings: "M4 8h9M17 8h3M4 16h3M11 16h9M15 5.500v5M9 13.500v5",
  info: "M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM12 11v5M12 8v.01",
  theme: "M20 14.500A8.500 8.500 0 0 1 9.500 4a8.500 8.500 0 1 0 10.500 10.500z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  check: "M5 12.500l4.500 4.500L19 7.500",
  again: "M4.500 12a7.500 7.500 0 1 0 2.500-5.600M7 3v3.800h3.800",
  edit: "M5 19h3.500L19 8.500 15.500 5 5 15.500zM13.500 7l3.500 3.500",
  tokens: "M4 8h6v8H4zM14 8h6v8h-6z",
  up: "M7 20V11l4.500-7c1.500 0 2.500 1.200 2 3L13 10h5.200a1.800 1.800 0 0 1 1.800 2.200l-1.400 6A2.300 2.300 0 0 1 16.400 20zM7 20H4v-9h3",
  down: "M7 4v9l4.500 7c1.500 0 2.500-1.200 2-3L13 14h5.200a1.800 1.800 0 0 0 1.800-2.200l-1.400-6A2.300 2.300 0 0 0 16.400 4zM7 4H4v9h3",
  remove: "M5 7h14M10 7V4.500h4V7M7 7l.8 12.500h8.400L17 7",
  save: "M12 4v11M7.500 11l4.500 4.500 4.500-4.500M5 20h14",
  previous: "M14.500 6l-6 6 6 6",
  next: "M9.500 6l6 6-6 6",
  tool: "M6 3h12v18H6zM9 7h6M9 12h.01M12 12h.01M15 12h.01M9 16.500h.01M12 16.500h.01M15 16.500h.01",
};

/**
 * An element. Keys of `props`: `class`, `text`, `on` ({event: listener}), `data`; all others are attributes, which are
 * left out where the value is null or false.
 */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An icon; without a label it is for the eye alone. */
export function icon(name, label = null) {
  const svg = document.createElementNS(SVG, "svg");
  const attributes = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  for (const [key, value] of Object.entries({ viewBox: "0 0 24 24", class: "icon", ...attributes })) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

export function iconButton(name, label, onClick, props = {}) {
  return el(
    "button",
    { type: "button", class: "icon-button small", "aria-label": label, title: label, ...props, on: { click: onClick } },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** A name that no other has. randomUUID is there on secure origins only, which a plain address in a network is not. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Ask with a dialog; resolves to whether it was agreed to. */
export function ask(question, label) {
  const dialog = byId("question");
  return new Promise((resolve) => {
    dialog.replaceChildren(
      el("p", { id: "question-text", text: question }),
      el(
        "div",
        { class: "dialog-buttons" },
        el("button", { type: "button", class: "quiet-button", text: "Cancel", on: { click: () => dialog.close("no") } }),
        el("button", { type: "button", class: "main-button", text: label, on: { click: () => dialog.close("yes") } }),
      ),
    );
    dialog.returnValue = "no";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
  });
}

/** Copy a text; the button says for a moment that it was done. */
export async function copyFrom(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Not a secure origin, or not allowed: by way of a selection.
    const area = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon("copy")), 1500);
}

/** Whether a key is the Enter that sends. Safari ends a composition before its Enter, which has the code 229 then. */
export function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}
