// Images of a question: brought to the server at once, so that what is wrong with one is said at once; shown small.

import * as api from "/page/api.js";
import { its } from "/page/app.js";
import { $, count, el, plural, say } from "/page/dom.js";

const KINDS = ["image/png", "image/jpeg", "image/webp", "image/gif"];
let drafts = []; // {id, name, width, height, tokens}, and while it is being brought {name}

// Of files, those that are images by themselves; what comes in a folder is read with it.
export const split = (files) => {
  const own = (one) => !one.name.includes("/") && one.file.type.startsWith("image/") && one.file.type !== "image/svg+xml";
  return [files.filter(own), files.filter((one) => !own(one))];
};

export const address = (id) => `/api/images/${encodeURIComponent(id)}`;

export const shown = () => drafts.filter((one) => one.id).map(({ id, name }) => ({ id, name }));

export const bringing = () => drafts.some((one) => !one.id);

export function place(images) {
  drafts = [...images];
  draw();
}

// Errors where one is not taken; the others are.
export async function attach(files, from) {
  const names = files.map((one) => one.name).join(", ");
  if (!its.images) throw new Error(`${its.model} reads no images, so ${names} is not shown to it. A model with an image encoder does.`);
  if (from) throw new Error(`Contexts are asked without images, so ${names} is not taken. Start a new chat to show one.`);
  const wrong = [];
  for (const { name, file } of files) {
    const draft = { name: name.slice(0, 300) };
    drafts.push(draft);
    draw();
    try {
      if (!KINDS.includes(file.type)) throw new Error("it can be one of PNG, JPEG, WEBP, GIF");
      const form = new FormData();
      form.append("file", file, "file");
      Object.assign(draft, await api.post("/images", form));
    } catch (error) {
      drafts = drafts.filter((one) => one !== draft);
      wrong.push(`${name}: ${error.message}`);
    }
    draw();
  }
  if (wrong.length) throw new Error(wrong.join(" "));
  say(`${plural(files.length, "image")} will be shown with the question.`);
}

function drop(draft) {
  drafts = drafts.filter((one) => one !== draft);
  draw();
  $("ask").focus();
}

function draw() {
  $("shown").hidden = !drafts.length;
  $("shown").replaceChildren(...drafts.map((one) => el("li", {},
    one.id ? el("img", { src: address(one.id), alt: one.name }) : el("span", { class: "waiting" }, "…"),
    el("small", {}, el("span", {}, one.name), one.tokens ? el("span", {}, `${count(one.tokens)} tokens`) : null),
    el("button", { type: "button", class: "remove", "aria-label": `Take out ${one.name}`, onclick: () => drop(one) }, "×"))));
}

// Of a message, each as large as it needs to be, and whole where it is chosen.
export function figures(images) {
  if (!images?.length) return null;
  return el("ul", { class: "pictures", "aria-label": "Images" }, ...images.map((one) => el("li", {},
    el("a", { href: address(one.id), target: "_blank", rel: "noopener noreferrer", title: `${one.name} · ${count(one.width)} × ${count(one.height)}` },
      el("img", { src: address(one.id), alt: one.name, width: one.width, height: one.height, loading: "lazy" })))));
}
