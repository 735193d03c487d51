// Markdown to elements. markdown-it makes HTML of it and lets no HTML of the text through; DOMPurify makes elements of
// that, with a short list of what may be there. Nothing is loaded from anywhere: of a picture its description is shown.

import { el, copyFrom, icon } from "./dom.js";
import { segments } from "./chat.js";

const md = window.markdownit({ html: false, linkify: false, breaks: true });

const TAGS = [
  ..."p br strong em s code pre ul ol li blockquote hr a span".split(" "),
  ..."h3 h4 h5 h6 table thead tbody tr th td".split(" "),
];
const PURIFY = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "title", "start", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

md.renderer.rules.image = (tokens, index) => {
  const { content, attrs } = tokens[index];
  const where = Object.fromEntries(attrs).src;
  return `<span class="picture">${md.utils.escapeHtml(content || where)} (picture, not loaded)</span>`;
};

// The page has the headings of the first two levels.
for (const rule of ["heading_open", "heading_close"]) {
  md.renderer.rules[rule] = (tokens, index, options, env, self) => {
    const token = tokens[index];
    token.tag = `h${Math.min(6, Number(token.tag[1]) + 2)}`;
    return self.renderToken(tokens, index, options);
  };
}

// A style attribute would be against the page's policy.
for (const rule of ["th_open", "td_open"]) {
  md.renderer.rules[rule] = (tokens, index, options, env, self) => {
    const token = tokens[index];
    const style = token.attrGet("style");
    token.attrs = style ? [["class", style.replace("text-align:", "align-")]] : null;
    return self.renderToken(tokens, index, options);
  };
}

// Characters that stand for the tool calls while the text around them is read; a text that has them itself loses them.
const OPEN = "\uE000";
const CLOSE = "\uE001";
const CALL = /\uE000(\d+)\uE001/;

function sourceOf(parts) {
  const tools = [];
  const text = segments(parts)
    .map((each) => (each.type === "text" ? each.text.replace(/[\uE000\uE001]/g, "\uFFFD") : `${OPEN}${tools.push(each) - 1}${CLOSE}`))
    .join("");
  return { text: text.replace(/\r\n?/g, "\n"), tools };
}

/** A tool call as one line: expression = result. */
export function toolLine({ expression, result }) {
  return el(
    "span",
    { class: "tool", title: "The model asked the calculator" },
    icon("tool", "Calculator:"),
    el("span", { text: `${expression} = ${result ?? "…"}` }),
  );
}

function fragmentOf(html, tools) {
  const fragment = window.DOMPurify.sanitize(html, PURIFY);
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) if (CALL.test(walker.currentNode.data)) texts.push(walker.currentNode);
  for (const text of texts) {
    // Every second piece is the number of a call.
    const pieces = text.data.split(CALL).map((piece, i) => (i % 2 ? tools[piece] && toolLine(tools[piece]) : piece));
    text.replaceWith(...pieces.filter(Boolean));
  }
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const block of fragment.querySelectorAll("pre")) wrapCode(block);
  for (const table of fragment.querySelectorAll("table")) {
    const box = el("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" });
    table.replaceWith(box);
    box.append(table);
  }
  return fragment;
}

function wrapCode(block) {
  const language = /language-([\w+#.-]+)/.exec(block.firstElementChild?.className ?? "")?.[1] ?? "";
  const copy = el("button", { type: "button", class: "icon-button small", "aria-label": "Copy the code", title: "Copy the code" }, icon("copy"));
  copy.addEventListener("click", () => copyFrom(copy, block.textContent));
  const box = el("div", { class: "code" }, el("div", { class: "code-top" }, el("span", { text: language || "code" }), copy));
  block.replaceWith(box);
  block.tabIndex = 0;
  block.setAttribute("role", "region");
  block.setAttribute("aria-label", `Code${language ? ` in ${language}` : ""}`);
  box.append(block);
}

/** Parts of an answer, whole. */
export function renderParts(node, parts) {
  const { text, tools } = sourceOf(parts);
  node.replaceChildren(fragmentOf(md.render(text), tools));
}

/**
 * Renders an answer that grows: what stands before its last two blocks is not read again. The last alone would not do:
 * "2" after a list is a paragraph, until a dot makes it an item of the list. A link that is defined further down than it
 * is used becomes one when the whole is rendered, at the end.
 */
export class GrowingText {
  #node;
  #done = 0; // characters of the text whose blocks are there for good
  #last = []; // the nodes of the blocks behind that
  #env = {};

  constructor(node) {
    this.#node = node;
    node.replaceChildren();
  }

  update(parts) {
    const { text, tools } = sourceOf(parts);
    const tail = text.slice(this.#done);
    const start = startOfLastBlocks(tail);
    for (const node of this.#last) node.remove();
    if (start > 0) {
      this.#node.append(fragmentOf(md.render(tail.slice(0, start), this.#env), tools));
      this.#done += start;
    }
    const fragment = fragmentOf(md.render(tail.slice(start), this.#env), tools);
    this.#last = [...fragment.childNodes];
    this.#node.append(fragment);
  }
}

/** Where the last block but one begins. */
function startOfLastBlocks(text) {
  const blocks = md.parse(text, {}).filter((token) => token.level === 0 && token.nesting >= 0 && token.map);
  let line = blocks.at(-2)?.map[0] ?? 0;
  let start = 0;
  for (; line > 0; line -= 1) start = text.indexOf("\n", start) + 1;
  return start;
}
