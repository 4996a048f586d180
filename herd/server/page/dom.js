// Elements are made of nodes, never of HTML: no text that comes from anywhere can become a tag.

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "class") node.className = value;
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  return fill(node, ...children);
}

// Puts children into a node, in place of those it had; what is null or false is left out.
export function fill(node, ...children) {
  node.replaceChildren(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const $ = (id) => document.getElementById(id);

export const count = (number) => Number(number).toLocaleString("en");

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function clock(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function say(text) {
  $("status").textContent = text;
}

export function fail(error) {
  const place = $("error");
  place.textContent = error ? error.message || String(error) : "";
  place.hidden = !error;
}

// A question in a dialog: the values of its fields, or null where it is left.
export function dialog(title, action, ...fields) {
  const box = $("dialog");
  return new Promise((resolve) => {
    const form = el("form", { method: "dialog", class: "stack" }, el("h2", { id: "dialog-title" }, title), ...fields,
      el("p", { class: "row end" },
        el("button", { type: "button", onclick: () => box.close() }, "Cancel"),
        el("button", { class: "strong", type: "submit", value: "yes" }, action)));
    box.returnValue = "";
    box.onclose = () => {
      resolve(box.returnValue === "yes" ? new FormData(form) : null);
      box.replaceChildren();
    };
    box.replaceChildren(form);
    box.showModal();
  });
}

export function field(label, props, note) {
  const id = `field-${props.name}`;
  const help = note ? `${id}-note` : undefined;
  const { tag = "input", ...rest } = props;
  return el("p", { class: "field" }, el("label", { htmlFor: id }, label),
    el(tag, { id, "aria-describedby": help, ...rest }), note ? el("small", { id: help }, note) : null);
}
