// The token view of an answer: how likely each token was, what could have stood there, what the calculator put in.

import { el } from "./dom.js";
import { recentTokens } from "./generate.js";
import { say } from "./speech.js";
import { tokensOf } from "./store.js";

const ENDS = ["<|assistant_end|>", "<|bos|>"];
const SHOWN = 1500; // of a long answer; more buttons than that make a page slow

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 && logprob < 0 ? "> 99.9%" : value < 0.05 ? "< 0.1%" : `${value.toFixed(1)}%`;
};

/** A token for people: ends of lines can be seen, spaces where there is nothing else, and bytes that are no character. */
function readable(token) {
  if (token.special) return token.special.replace(/^<\|(.*)\|>$/, "$1");
  const isSpace = token.text.trim() === "";
  if (token.text.includes("\uFFFD") || (isSpace && /[^ \n\t]/.test(token.text))) {
    return `<${token.bytes.map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ")}>`;
  }
  const text = token.text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return isSpace ? text.replaceAll(" ", "␣") : text.replace(/^ | $/g, "\u00A0");
}

/** The same for a screen reader. */
function spoken(token) {
  if (token.special) return `special token ${readable(token)}`;
  const names = { " ": "space", "\n": "new line", "\t": "tab", "": "nothing" };
  return names[token.text] ?? readable(token).replaceAll("\u00A0", " ");
}

/** What is said of a token that was chosen. */
function summary(token) {
  const others = (token.top ?? []).filter((other) => other.id !== token.id).slice(0, 3);
  const names = others.map((other) => `${spoken(other)} ${percent(other.logprob)}`).join(", ");
  const origin = token.forced ? "put in by the calculator, " : "";
  return `${spoken(token)}: ${origin}${percent(token.logprob)}.${names ? ` Others: ${names}.` : ""}`;
}

function likelihood(token) {
  if (token.forced) return "forced";
  const value = Math.exp(token.logprob);
  const bounds = [0.9, 0.6, 0.3, 0.1, 0.02];
  return `p${bounds.findIndex((bound) => value >= bound) + 1 || 6}`;
}

/**
 * The view of a version.
 *
 * @param goOn called with {begun, from, ends} to continue with another token.
 */
export async function inspector(version, goOn) {
  const tokens = recentTokens(version) ?? (await tokensOf(version.id));
  const box = el("div", { class: "inspector" });
  if (!tokens.length) {
    box.append(el("p", { class: "hint", text: "Nothing was recorded of this answer's tokens." }));
    return box;
  }
  const details = el("div", { class: "token-details" });
  details.append(el("p", { class: "hint", text: "Choose a token to see its probability and what else could have stood there." }));
  const list = el("div", { class: "tokens", role: "toolbar", "aria-label": "Tokens of the answer; arrow keys move" });
  const buttons = tokens.slice(0, SHOWN).map((token, index) => {
    const name = token.forced ? "put in by the calculator" : percent(token.logprob);
    const button = el("button", {
      type: "button",
      class: `token ${likelihood(token)}${token.special ? " special" : ""}`,
      tabindex: index === 0 ? "0" : "-1",
      "aria-label": `${spoken(token)}, ${name}`,
      "aria-pressed": "false",
      text: readable(token),
    });
    list.append(button);
    if (token.text.includes("\n") && !token.special) list.append(el("br"));
    return button;
  });
  const choose = (index) => {
    for (const [i, button] of buttons.entries()) {
      if (i === index || button.getAttribute("aria-pressed") === "true") button.setAttribute("aria-pressed", String(i === index));
    }
    details.replaceChildren(...describe(tokens, index, goOn));
    say(summary(tokens[index]));
  };
  const move = (index) => {
    for (const button of buttons) if (button.tabIndex === 0) button.tabIndex = -1;
    buttons[index].tabIndex = 0;
    buttons[index].focus();
  };
  list.addEventListener("click", (event) => {
    const index = buttons.indexOf(event.target.closest("button"));
    if (index < 0) return;
    move(index);
    choose(index);
  });
  list.addEventListener("keydown", (event) => {
    const index = buttons.indexOf(document.activeElement);
    const steps = { ArrowRight: index + 1, ArrowLeft: index - 1, ArrowDown: index + 10, ArrowUp: index - 10, Home: 0, End: buttons.length - 1 };
    if (!(event.key in steps) || index < 0) return;
    event.preventDefault();
    move(Math.min(buttons.length - 1, Math.max(0, steps[event.key])));
  });
  box.append(list, legend(), details);
  if (tokens.length > SHOWN) box.append(el("p", { class: "hint", text: `The first ${SHOWN} of ${tokens.length} tokens.` }));
  return box;
}

function legend() {
  const levels = [["p1", "over 90%"], ["p2", "60–90%"], ["p3", "30–60%"], ["p4", "10–30%"], ["p5", "2–10%"], ["p6", "under 2%"], ["forced", "calculator"]];
  return el("p", { class: "legend" }, ...levels.map(([level, text]) => el("span", { class: `token-key ${level}`, text })));
}

function bar(logprob) {
  const fill = el("span", { class: "bar-fill" });
  fill.style.width = `${100 * Math.exp(logprob)}%`;
  return el("span", { class: "bar", "aria-hidden": "true" }, fill);
}

function describe(tokens, index, goOn) {
  const token = tokens[index];
  const found = [
    el(
      "p",
      { class: "token-head" },
      el("strong", { class: "token-name", text: readable(token) }),
      token.logprob === null ? "" : ` ${percent(token.logprob)}`,
      el("span", { class: "hint", text: ` token ${token.id}, number ${index + 1} of ${tokens.length}${token.logprob === null ? "" : `, log-probability ${token.logprob.toFixed(3)}`}` }),
    ),
  ];
  if (token.forced) {
    found.push(el("p", { class: "note", text: "The calculator put this token in; the model did not choose it. The probability is what the model would have given it." }));
  }
  if (token.chosen) found.push(el("p", { class: "note", text: "You chose this token; the answer was continued from it." }));
  const top = token.top ?? [];
  if (!top.length) return found;
  const body = el("tbody");
  for (const other of top) {
    const isThis = other.id === token.id;
    const ends = ENDS.includes(other.special);
    const begun = [...tokens.slice(0, index), { ...other, forced: false, chosen: true, top }];
    const from = { token: readable(token), instead: readable(other) };
    const label = ends ? "End here" : "Continue";
    body.append(
      el(
        "tr",
        { class: isThis ? "taken" : "" },
        el("th", { scope: "row", class: "token-name", text: readable(other) }),
        el("td", { class: "amount", text: percent(other.logprob) }),
        el("td", {}, bar(other.logprob)),
        el(
          "td",
          {},
          isThis
            ? el("span", { class: "hint", text: "stands here" })
            : el("button", { type: "button", class: "quiet-button small", text: label, "aria-label": `${label} with ${spoken(other)}`, on: { click: () => goOn({ begun, from, ends }) } }),
        ),
      ),
    );
  }
  found.push(
    el("table", { class: "alternatives" }, el("caption", { text: "Most likely tokens at this place, by the model's own probabilities" }), body),
  );
  return found;
}
