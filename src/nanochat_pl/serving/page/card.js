// What is known of the models that are served.

import { byId, el } from "./dom.js";

const number = new Intl.NumberFormat("en");

/** A metric with its standard error, for people. */
function shown(value, stderr) {
  const digits = (each) => (Number.isInteger(each) ? number.format(each) : each.toFixed(4));
  return stderr === undefined ? digits(value) : `${digits(value)} ± ${digits(stderr)}`;
}

const NAMES = {
  "val/bpb": "Bits per byte, held-out text",
  "val/loss": "Loss, held-out text",
  bpb: "Bits per byte",
};

/** Numbers in the metrics, by name; nested ones with their path. A standard error goes to what it is of. */
export function rowsOf(metrics) {
  const flat = new Map();
  const collect = (node, path) => {
    for (const [name, value] of Object.entries(node ?? {})) {
      const key = path ? `${path}/${name}` : name;
      if (typeof value === "number") flat.set(key, value);
      else if (value && typeof value === "object" && !Array.isArray(value)) collect(value, key);
    }
  };
  collect(metrics, "");
  const isError = (name) => /_stderr(\/|$)/.test(name);
  const of = (name) => {
    const [first, ...rest] = name.split("/");
    const candidates = [`${name}_stderr`, [`${first}_stderr`, ...rest].join("/")];
    return flat.get(candidates.find((each) => flat.has(each)));
  };
  return [...flat]
    .filter(([name]) => !isError(name))
    .map(([name, value]) => [NAMES[name] ?? name.replaceAll("_", " ").replaceAll("/", " / "), shown(value, of(name))]);
}

function table(caption, rows) {
  const body = el("tbody");
  for (const [name, value] of rows) {
    body.append(el("tr", {}, el("th", { scope: "row", text: name }), el("td", { text: value })));
  }
  return el("table", { class: "facts" }, el("caption", { text: caption }), body);
}

function cardOf(model) {
  if (model.depth === undefined) return [el("h3", { text: model.id }), el("p", { text: "Is being loaded." })];
  const facts = [
    ["Stage of training", `${model.stage}, step ${number.format(model.step)}`],
    ["Parameters", number.format(model.parameters)],
    ["Depth", `${model.depth} layers, ${model.width} wide`],
    ["Vocabulary", `${number.format(model.vocab_size)} tokens`],
    ["Context", `${number.format(model.max_context)} tokens`],
    ["Runs on", `${model.device}, ${model.dtype}`],
    ["Weights", model.weights],
  ];
  const metrics = rowsOf(model.metrics);
  return [
    el("h3", { text: model.id }),
    table("Model", facts),
    metrics.length ? table("Measured", metrics) : el("p", { class: "hint", text: "Nothing was measured in this stage." }),
  ];
}

export function showCards(info) {
  const dialog = byId("card");
  dialog.replaceChildren(
    el("h2", { id: "card-title", tabindex: "-1", autofocus: true, text: info.models.length > 1 ? "About the models" : "About the model" }),
    ...info.models.flatMap(cardOf),
    el(
      "div",
      { class: "dialog-buttons" },
      el("button", { type: "button", class: "main-button", text: "Close", on: { click: () => dialog.close() } }),
    ),
  );
  dialog.showModal();
}
