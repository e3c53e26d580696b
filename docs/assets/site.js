// The calculator, the threshold slider and the filter of tables. Their data stand in the page; nothing is fetched.
"use strict";

function make(parent, tag, text, attributes) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

function short(value) {
  return value >= 9.95 ? value.toFixed(0) : value.toFixed(1);
}

function calculator(root, data) {
  const form = make(root, "p");
  const model = make(make(form, "label", "Model "), "select");
  for (const name of Object.keys(data.shapes)) make(model, "option", name);
  const rate = make(make(form, "label", " Memory, GB/s "), "input", undefined, {
    type: "number", min: 1, max: 2000, value: 40,
  });
  const result = make(root, "table");
  const show = () => {
    result.replaceChildren();
    const shape = data.shapes[model.value];
    const head = make(make(result, "thead"), "tr");
    for (const title of ["mode", "tokens/s", "memory, GB", "disk, GB"]) make(head, "th", title);
    const body = make(result, "tbody");
    for (const [name, mode] of Object.entries(data.modes)) {
      const row = make(body, "tr");
      const plain = name === "plain";
      make(row, "td", mode.title);
      make(row, "td", short((mode.efficiency * rate.value * 1e9) / shape.bytes[name]));
      make(row, "td", short((plain ? shape.plain_memory : shape.memory) / 1e9));
      make(row, "td", plain ? "0" : short(shape.disk / 1e9));
    }
  };
  model.addEventListener("change", show);
  rate.addEventListener("input", show);
  show();
}

function slider(root, data) {
  make(root, "p", data.question);
  const text = make(root, "p", undefined, { class: "river-tokens" });
  const tokens = data.texts.map((token) => make(text, "span", token));
  const input = make(make(root, "label", "Exit threshold "), "input", undefined, {
    type: "range", min: 0, max: data.states.length - 1, value: 0,
  });
  const facts = make(root, "p", undefined, { class: "river-facts" });
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const show = () => {
    const at = Number(input.value);
    const state = data.states[at];
    tokens.forEach((token, i) => {
      token.style.setProperty("--depth", state.depths[i] / data.layers);
      token.title = `${state.depths[i]} of ${data.layers} layers in 16 bits, KL ${state.kl[i]}`;
    });
    const name = state.threshold ?? (at ? "none exits" : "all exit");
    const depth = mean(state.depths).toFixed(1);
    facts.textContent = `${name}: ${depth} of ${data.layers} layers in 16 bits, KL ${mean(state.kl).toFixed(3)} nats per token`;
  };
  input.addEventListener("input", show);
  show();
}

function filter(root) {
  const rows = [...root.parentElement.querySelectorAll("tbody tr")];
  const input = make(make(root, "label", "Show models that contain "), "input", undefined, { type: "search" });
  const count = make(root, "span", ` ${rows.length} rows`);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => content.includes(word));
    }
    count.textContent = ` ${rows.filter((row) => !row.hidden).length} rows`;
  });
}

for (const [name, fill] of Object.entries({ calculator, slider, filter })) {
  for (const root of document.querySelectorAll(`.river-${name}`)) {
    fill(root, JSON.parse(root.querySelector("script").textContent));
  }
}
