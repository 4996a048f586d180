// The page: what the server says is kept in `its`, and what is seen follows from it.

import * as api from "/page/api.js";
import { chatView } from "/page/chat.js";
import { contextView, homeView } from "/page/context.js";
import { $, count, dialog, el, fail, field, say } from "/page/dom.js";
import { openSettings } from "/page/settings.js";
import { closeSource } from "/page/source.js";
import { bringDrops, choose } from "/page/files.js";
import * as images from "/page/images.js";

export const its = { window: 0, model: "", images: false, chats: new Map(), contexts: new Map(), settings: {} };
let view = null; // what main shows: {id, heard, leave, ...}
let heardOnce = false;

export const context = (id) => its.contexts.get(id) || null;

export function go(hash) {
  if (location.hash === hash) show();
  else location.hash = hash;
}

// Makes a promise's error seen where errors are seen.
export async function attempt(work) {
  try {
    fail(null);
    return await work();
  } catch (error) {
    fail(error);
    return undefined;
  }
}

async function refresh() {
  const state = await api.get("/state");
  Object.assign(its, { window: state.window, model: state.model, images: state.images, settings: state.settings });
  its.chats = new Map(state.chats.map((chat) => [chat.id, chat]));
  its.contexts = new Map(state.contexts.map((found) => [found.id, found]));
  document.documentElement.dataset.theme = its.settings.theme || "";
  $("model").textContent = its.model;
  sides();
}

function sides() {
  const chats = [...its.chats.values()].sort((a, b) => b.changed - a.changed);
  const entry = (href, text, note) => {
    const here = href === location.hash;
    return el("li", {}, el("a", { href, "aria-current": here ? "page" : undefined }, el("span", {}, text), note ? el("small", {}, note) : null));
  };
  $("chats").replaceChildren(...chats.slice(0, 300).map((chat) => entry(`#/chat/${chat.id}`, chat.title || "New chat")));
  $("contexts").replaceChildren(...[...its.contexts.values()].map((one) =>
    entry(`#/context/${one.id}`, one.name, one.reading ? "reading…" : one.error ? "cannot be opened" : `${count(one.tokens)} tokens`)));
  if (!chats.length) $("chats").append(el("li", { class: "empty" }, "Chats are kept here."));
  if (!its.contexts.size) $("contexts").append(el("li", { class: "empty" }, "What was read is kept here."));
}

function show() {
  closeSource();
  menu(false);
  fail(null);
  view?.leave?.();
  const [, kind, id] = /^#\/(\w+)\/(\w+)$/.exec(location.hash) || [];
  if (kind === "chat" && its.chats.has(id)) view = chatView(id);
  else if (kind === "context" && its.contexts.has(id)) view = contextView(id);
  else view = homeView();
  $("view").replaceChildren(view.node);
  $("view").scrollTop = 0;
  title();
  composer();
  sides();
  view.shown?.();
}

function title() {
  const name = view.title();
  document.title = name ? `${name} – Herd` : "Herd";
  $("where").textContent = name || "Herd";
}

export function composer() {
  const busy = Boolean(view?.busy?.());
  for (const id of ["composer", "hint"]) $(id).hidden = view?.asks === false;
  $("send").hidden = busy;
  $("attach").hidden = !its.images || Boolean(view?.from?.());
  $("stop").hidden = !busy;
  $("hint").textContent = view?.hint?.() || "";
  $("ask").placeholder = view?.placeholder?.() || "Ask…";
}

function menu(open) {
  $("shell").classList.toggle("open", open);
  $("menu").setAttribute("aria-expanded", String(open));
}

// What the server tells.
function heard(event) {
  if (event.type === "hello" || event.type === "all") {
    attempt(async () => {
      await refresh();
      if (!heardOnce || (view && !view.alive())) show();
      else await view.again?.();
      heardOnce = true;
      document.body.dataset.ready = "yes";
    });
    return;
  }
  if (event.type === "chat") its.chats.set(event.chat.id, event.chat);
  if (event.type === "deleted") its.chats.delete(event.chat);
  if (event.type === "context") its.contexts.set(event.context.id, event.context);
  if (event.type === "progress" && context(event.context)) context(event.context).progress = event.progress;
  if (event.type === "context deleted") its.contexts.delete(event.context);
  if (event.type === "settings") {
    its.settings = event.settings;
    document.documentElement.dataset.theme = its.settings.theme || "";
  }
  if (view && !view.alive()) go("#/");
  view?.heard?.(event);
  if (["chat", "deleted", "context", "context deleted"].includes(event.type)) {
    sides();
    if (view) title();
  }
  if (event.type !== "piece" && event.type !== "progress") composer();
}

export async function rename(what, name, path, key) {
  const form = await dialog(`Rename this ${what}`, "Rename", field("Name", { name: "name", value: name, required: true, maxLength: 200 }));
  if (form) await attempt(() => api.patch(path, { [key]: form.get("name") }));
}

export async function erase(what, name, note, path) {
  const form = await dialog(`Delete ${what} “${name}”?`, "Delete", el("p", {}, note));
  if (form && await attempt(async () => (await api.remove(path), true))) say(`${name} was deleted.`);
}

async function submit() {
  const text = $("ask").value;
  if (images.bringing()) return say("Images are being brought; ask in a moment.");
  const shown = images.shown();
  if (!(text.trim() || shown.length) || view.busy?.()) return;
  $("send").disabled = true;
  await attempt(async () => {
    await view.ask(text, shown);
    $("ask").value = "";
    images.place([]);
    grow();
  });
  $("send").disabled = false;
}

// What is dropped, pasted or chosen: images are shown with a question, other files are read. These come first: a chat
// about them is asked without images.
export const receive = (files) => attempt(async () => {
  const [pictures, others] = images.split(files);
  if (others.length) await view?.bring?.(others);
  if (pictures.length) await images.attach(pictures, view?.asks === false || view?.from?.());
});

function grow() {
  const box = $("ask");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

function keys(event) {
  if (event.key === "Escape" && !$("dialog").open) {
    if (!$("source").hidden) closeSource();
    else if ($("shell").classList.contains("open")) menu(false), $("menu").focus();
    else if (view?.busy?.()) view.stop();
  }
}

$("composer").addEventListener("submit", (event) => (event.preventDefault(), submit()));
$("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), submit();
});
$("ask").addEventListener("input", grow);
$("stop").addEventListener("click", () => attempt(() => view.stop()));
$("menu").addEventListener("click", () => menu(!$("shell").classList.contains("open")));
$("open-settings").addEventListener("click", () => openSettings());
$("close-source").addEventListener("click", () => closeSource());
$("new").addEventListener("click", () => setTimeout(() => $("ask").focus()));
document.querySelector(".skip").addEventListener("click", (event) => (event.preventDefault(), $("ask").focus()));
document.addEventListener("keydown", keys);
window.addEventListener("hashchange", show);
$("attach").addEventListener("click", async () => receive(await choose("images")));
bringDrops(receive);

let lost;
api.listen(heard, (open) => {
  if (open) {
    lost = void clearTimeout(lost);
    return document.body.classList.remove("offline");
  }
  // A server that restarts is back within moments; only a longer absence is worth a word.
  lost ??= setTimeout(() => (document.body.classList.add("offline"), say("The server cannot be reached; trying again.")), 1500);
});
