// Contexts: what was read, what is being read, and the first page, where nothing is yet.

import * as api from "/page/api.js";
import { attempt, context, erase, its, receive, rename } from "/page/app.js";
import { newChat } from "/page/chat.js";
import { clock, count, el, fail, fill, plural, say } from "/page/dom.js";
import { choose, nameOf } from "/page/files.js";
import { openSource } from "/page/source.js";

const uploads = new Map(); // by context: [sent, of all]

// Makes a context for files, named after them.
export const startContext = async (files) => {
  const made = await api.post("/contexts", { name: nameOf(files) });
  its.contexts.set(made.id, made);
  return made;
};

export async function bringTo(id, files) {
  uploads.set(id, [0, files.length]);
  try {
    await api.upload(id, files, (sent, all) => {
      uploads.set(id, [sent, all]);
      for (const bar of document.querySelectorAll(`[data-reading="${id}"]`)) bar.replaceWith(readingOf(context(id)));
    });
  } finally {
    uploads.delete(id);
    for (const bar of document.querySelectorAll(`[data-reading="${id}"]`)) bar.replaceWith(readingOf(context(id)));
  }
}

// How far a read is, what came of the last one, and how much of the model's window is taken.
export function readingOf(one) {
  if (!one) return null;
  const box = el("div", { class: "reading", "data-reading": one.id });
  const sending = uploads.get(one.id), at = one.progress;
  if (sending) {
    box.append(el("progress", { max: sending[1], value: sending[0], "aria-label": "Uploading" }),
      el("p", {}, `Bringing files: ${count(sending[0])} of ${count(sending[1])}`));
  } else if (one.reading) {
    const bar = el("progress", { "aria-label": "Reading" });
    let text = "Reading…";
    if (at) {
      const left = at.eta_s === null || at.eta_s === undefined ? "" : ` · ${clock(at.eta_s)} left`;
      if (left && at.tokens_per_s) {
        bar.max = 1000;
        const done = at.read_tokens / at.tokens_per_s;
        bar.value = Math.min(1000, 1000 * done / Math.max(done + at.eta_s, 1e-9));
      }
      text = `Reading: ${count(at.sources)} of ${plural(at.sources_total, "file")}`;
      if (at.tokens_per_s) text += ` · ${count(at.read_tokens)} tokens · ${count(Math.round(at.tokens_per_s))} tokens/s${left}`;
    }
    box.append(bar, el("p", {}, text));
  } else if (one.last?.error) box.append(el("p", { class: "wrong" }, one.last.error));
  else if (one.last) {
    const kept = one.last.reused_tokens ? `, ${count(one.last.reused_tokens)} were known` : "";
    box.append(el("p", { class: "note" }, `Read ${count(one.last.read_tokens)} tokens in ${clock(one.last.seconds)}${kept}.`));
  }
  if (one.error) box.append(el("p", { class: "wrong" }, one.error));
  else box.append(meter(one.tokens));
  return box;
}

function meter(tokens) {
  const share = 100 * tokens / its.window;
  const short = its.window >= 1e6 ? `${(its.window / 1e6).toFixed(1).replace(".0", "")}M` : count(its.window);
  return el("div", { class: "window" }, el("meter", { min: 0, max: its.window, value: tokens, "aria-label": "Window taken" }),
    el("p", { title: `${count(its.window)} tokens` }, `${count(tokens)} of ${short} tokens (${share < 0.1 ? share.toPrecision(1) : share.toFixed(1)} %)`));
}

const buttons = () => el("p", { class: "row" },
  el("button", { class: "strong", onclick: async () => receive(await choose("folder")) }, "Choose a folder"),
  el("button", { onclick: async () => receive(await choose("files")) }, "Choose files"));

export function homeView() {
  const bring = async (files) => {
    const made = await startContext(files);
    await newChat(made.id);
    say(`${plural(files.length, "file")} will be read into ${made.name}.`);
    await bringTo(made.id, files);
  };
  const shown = its.images ? " Images are shown with your question." : "";
  const step = (title, text) => el("li", {}, el("h2", {}, title), el("p", {}, text));
  const node = el("section", { class: "home", "aria-label": "Begin" },
    el("h1", {}, "What should be read?"),
    el("div", { class: "well" }, el("p", {}, `Drop a folder, PDFs or any text files here.${shown}`), buttons()),
    el("ol", { class: "steps" },
      step("Read once", "Every file is read whole and kept on this machine. What cannot be read is listed, with the reason."),
      step("Ask", "Answers quote what was read. Each names its lines; choose them to see the source."),
      step("Come back", "Chats and what was read are here tomorrow. Drop a folder again, and only what changed is read.")));
  return {
    node, bring, alive: () => true, title: () => "",
    ask: async (text, images) => newChat(null, text, images),
    hint: () => "Or just ask: without files, the model answers from what it remembers, which may be wrong.",
    placeholder: () => "Ask without files…",
  };
}

export function contextView(id) {
  const now = () => context(id);
  const head = el("header", { class: "head" }), bar = el("div", {}), body = el("div", {});
  const node = el("section", { class: "context", "aria-label": "Context" }, head, bar, body);
  let busy = false, wanted = false;

  function top() {
    const one = now();
    if (!one) return;
    fill(head, el("h1", {}, one.name), el("p", { class: "row" },
      el("button", { class: "strong", onclick: () => attempt(() => newChat(id)) }, "Ask about it"),
      el("button", { class: "quiet", onclick: () => rename("context", one.name, `/contexts/${id}`, "name") }, "Rename"),
      el("button", { class: "quiet", onclick: () => erase("context", one.name, "What was read, and the files that were brought, are gone then. Chats about it stay.", `/contexts/${id}`) }, "Delete")),
      one.watches ? el("p", { class: "note" }, `Follows the folder ${one.watches}: what changes there is read again.`) : null);
    fill(bar, readingOf(one));
  }

  async function load() {
    if (busy) return void (wanted = true);
    busy = true;
    const whole = await api.get(`/contexts/${id}`).catch(fail); // what went wrong before stays said: nobody asked for this
    busy = false;
    if (wanted) return void ((wanted = false), load());
    if (!whole) return;
    const own = !now()?.watches;
    const row = (file) => el("tr", {}, el("th", { scope: "row" }, el("button", { class: "link", onclick: () => openSource(id, file.name, 1, 0) }, file.name)),
      el("td", {}, count(file.tokens)),
      own ? el("td", {}, el("button", { class: "quiet", "aria-label": `Take out ${file.name}`, onclick: () => attempt(() => api.remove(`/contexts/${id}/files?name=${encodeURIComponent(file.name)}`)) }, "Take out")) : null);
    const files = whole.files.length
      ? el("div", { class: "wide", tabIndex: 0, role: "region", "aria-label": "Files that were read" }, el("table", {}, el("caption", {}, plural(whole.files.length, "file")),
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "File"), el("th", { scope: "col" }, "Tokens"), own ? el("td") : null)),
        el("tbody", {}, ...whole.files.slice(0, 2000).map(row))))
      : el("p", { class: "empty" }, now()?.reading ? "The first files are being read." : "Nothing was read yet. Drop files here, or choose them.");
    const skipped = whole.skipped.length ? el("details", { open: whole.skipped.length <= 20 }, el("summary", {}, `${plural(whole.skipped.length, "file")} not read`),
      el("ul", { class: "skipped" }, ...whole.skipped.slice(0, 2000).map((one) => el("li", {}, el("b", {}, one.name), ` – ${one.reason}`)))) : null;
    const cut = whole.files.length > 2000 ? el("p", { class: "note" }, "The first 2,000 are shown; all were read.") : null;
    fill(body, whole.warning ? el("p", { class: "wrong" }, whole.warning) : null, files, cut, skipped,
      own ? el("div", { class: "well" }, el("p", {}, "Drop more files here. What did not change is not read again."), buttons()) : null);
  }

  top();
  return {
    node, asks: false,
    bring: (files) => bringTo(id, files),
    alive: () => its.contexts.has(id),
    title: () => now()?.name || "",
    shown: load,
    again: async () => (top(), load()),
    heard(event) {
      if (event.type === "progress" && event.context === id) fill(bar, readingOf(now()));
      if (event.type === "context" && event.context.id === id) top(), load();
    },
  };
}
