// One chat: its messages, as they are written.

import * as api from "/page/api.js";
import { attempt, composer, context, erase, go, its, rename } from "/page/app.js";
import { bringTo, readingOf, startContext } from "/page/context.js";
import { $, el, fail, fill, plural, say } from "/page/dom.js";
import { figures, place } from "/page/images.js";
import { markdown } from "/page/markdown.js";
import { openSource } from "/page/source.js";

const asked = new Set(); // chats whose answer was asked for here, and not told yet

export function chatView(id) {
  const chat = () => its.chats.get(id);
  const messages = new Map(); // in order, by id
  const nodes = new Map();
  const list = el("ol", { class: "messages", "aria-label": "Messages" });
  const earlier = el("button", { class: "quiet earlier", hidden: true, onclick: () => fetchEarlier() }, "Earlier messages");
  const head = el("header", { class: "head" });
  const node = el("section", { class: "chat", "aria-label": "Chat" }, head, earlier, list);
  let editing = null, frame = 0, left = false;
  let late = null; // events that come while the chat is fetched, which may be older than they are
  const dirty = new Set();

  const last = () => [...messages.values()].at(-1);
  const busy = () => last()?.state === "writing";
  const atEnd = () => $("view").scrollHeight - $("view").scrollTop - $("view").clientHeight < 80;
  const toEnd = () => ($("view").scrollTop = $("view").scrollHeight);

  function heading() {
    const now = chat();
    if (!now) return;
    const choose = el("select", { id: "choose-context", onchange: (event) => attempt(() => api.patch(`/chats/${id}`, { context: event.target.value })) },
      el("option", { value: "" }, "nothing: talk to the model alone"),
      ...[...its.contexts.values()].map((one) => el("option", { value: one.id, selected: one.id === now.context }, one.name)));
    fill(head, el("h1", {}, now.title || "New chat"),
      el("p", { class: "row" },
        el("label", { htmlFor: "choose-context" }, "Answers come from"), choose,
        now.context ? el("a", { href: `#/context/${now.context}` }, "What it has read") : null,
        el("button", { class: "quiet", onclick: () => rename("chat", now.title, `/chats/${id}`, "title") }, "Rename"),
        el("button", { class: "quiet", onclick: () => erase("chat", now.title || "New chat", "Its messages are gone then, for good.", `/chats/${id}`) }, "Delete")),
      now.context ? readingOf(context(now.context)) : null);
  }

  function put(message) {
    const known = messages.get(message.id);
    if (known && known.state !== "writing" && message.state === "writing") return; // an old one, late
    if (known && message.pieces < known.pieces) return;
    messages.set(message.id, message);
    const fresh = !nodes.has(message.id);
    const before = fresh && messages.size > 1 ? [...messages.keys()].at(-2) : null;
    draw(message.id);
    if (fresh) list.append(nodes.get(message.id));
    if (before !== null) draw(before); // whose buttons may change
  }

  function draw(message) {
    const its = messages.get(message);
    if (!its) return;
    const old = nodes.get(message), fresh = drawn(its);
    if (old) old.replaceWith(fresh);
    nodes.set(message, fresh);
  }

  function drawn(message) {
    const mine = message.role === "user", who = mine ? "You" : message.role === "system" ? "System" : "Herd";
    const body = el("div", { class: "body" });
    if (mine) body.append(message.content);
    else if (message.detail.quoted && message.content) body.append(el("blockquote", { class: "quote" }, message.content));
    else body.append(...markdown(message.content));
    if (message.state === "writing" && !message.content) body.append(el("p", { class: "waiting" }, message.detail.context ? "looking…" : "thinking…"));
    return el("li", { class: `message ${message.role} ${message.state}`, id: `m${message.id}` },
      el("h2", { class: "hidden" }, who), figures(message.detail.images), mine && !message.content ? null : body, citations(message),
      message.detail.error ? el("p", { class: "wrong" }, message.detail.error) : null,
      message.state === "stopped" ? el("p", { class: "note" }, "stopped here") : null,
      message.detail.finish === "length" ? el("p", { class: "note" }, "This is as long as an answer may be; the settings say how long.") : null,
      message.state === "writing" ? null : tools(message));
  }

  function citations(message) {
    const found = message.detail.citations || [];
    if (!found.length) return null;
    const absent = message.content.endsWith("is not in the context.");
    return el("div", { class: "citations" }, el("span", {}, absent ? "Looked at" : "From"), ...found.map((one) => {
      const [first, end] = one.lines, place = `${one.source}:${first === end ? first : `${first}–${end}`}`;
      const share = `${Math.round(one.weight * 100)} % of the attention`;
      if (!message.detail.context) return el("span", { class: "chip", title: share }, place);
      return el("button", { class: "chip", title: share, onclick: () => openSource(message.detail.context, one.source, first, end) }, place);
    }));
  }

  function tools(message) {
    const mine = message.role === "user", latest = last()?.id === message.id;
    const copy = el("button", { class: "quiet", onclick: () => navigator.clipboard.writeText(message.content).then(() => say("Copied."), fail) }, "Copy");
    const facts = message.detail.tokens ? `${plural(message.detail.tokens, "token")} in ${message.detail.seconds.toFixed(1)} s` : "";
    return el("p", { class: "tools" }, copy,
      mine ? el("button", { class: "quiet", onclick: () => edit(message) }, "Edit") : null,
      !mine && latest ? el("button", { class: "quiet", onclick: () => attempt(() => api.post(`/chats/${id}/again`)) }, "Again") : null,
      el("button", { class: "quiet", onclick: () => cut(message) }, "Delete"),
      facts ? el("small", {}, facts) : null);
  }

  async function cut(message) {
    const more = [...messages.keys()].filter((other) => other > message.id).length;
    const note = more ? `${plural(more, "later message")} will go with it.` : "It is gone then, for good.";
    await erase("the message", message.content.slice(0, 40), note, `/chats/${id}/messages/${message.id}`);
  }

  function edit(message) {
    editing = message.id;
    $("ask").value = message.content;
    place(message.detail.images || []);
    $("ask").dispatchEvent(new Event("input"));
    $("ask").focus();
    composer();
  }

  function forget(first) {
    for (const message of [...messages.keys()].filter((other) => other >= first)) {
      nodes.get(message).remove();
      nodes.delete(message);
      messages.delete(message);
    }
    const end = last();
    if (end) draw(end.id);
  }

  // Pieces come faster than a screen shows them: what changed is drawn once a frame.
  function later(message) {
    dirty.add(message);
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      const follow = atEnd();
      for (const one of dirty) draw(one);
      dirty.clear();
      if (follow) toEnd();
    });
  }

  async function load() {
    if (late) return; // one is on its way, and what comes after it is heard
    late = [];
    let events;
    const found = await api.get(`/chats/${id}`).finally(() => ([events, late] = [late, null]));
    if (left) return;
    its.chats.set(id, found.chat);
    const keep = atEnd() || !messages.size;
    forget(0);
    for (const message of found.messages) messages.set(message.id, message);
    for (const message of found.messages) draw(message.id);
    list.replaceChildren(...nodes.values());
    earlier.hidden = !found.more;
    heading();
    composer();
    if (keep) toEnd();
    if (asked.has(id)) tell(found.messages.at(-1)); // it may have ended before anybody looked
    for (const event of events) heard(event);
  }

  function tell(message) {
    if (message?.role !== "assistant" || message.state === "writing") return;
    asked.delete(id);
    say(`Answer: ${message.content.slice(0, 500)}`);
  }

  async function fetchEarlier() {
    const first = messages.keys().next().value;
    const found = await attempt(() => api.get(`/chats/${id}?before=${first}`));
    if (!found || left) return;
    const height = $("view").scrollHeight, later = [...messages.entries()], fresh = [];
    messages.clear();
    for (const message of found.messages) messages.set(message.id, message);
    for (const [key, value] of later) messages.set(key, value);
    for (const message of found.messages) draw(message.id), fresh.push(nodes.get(message.id));
    list.prepend(...fresh);
    earlier.hidden = !found.more;
    $("view").scrollTop += $("view").scrollHeight - height;
    say(`${plural(fresh.length, "earlier message")} shown.`);
  }

  function heard(event) {
    if (late) return void late.push(event);
    if (event.type === "piece" && event.chat === id) {
      const message = messages.get(event.message);
      if (!message || event.piece > message.pieces + 1) return void load(); // something was missed
      if (event.piece <= message.pieces) return;
      messages.set(event.message, { ...message, content: message.content + event.text, pieces: event.piece });
      later(event.message);
    } else if (event.type === "message" && event.message.chat === id) {
      const follow = atEnd() || event.message.role === "user";
      put(event.message);
      if (follow) toEnd();
      tell(event.message);
    } else if (event.type === "cut" && event.chat === id) forget(event.first);
    else if (event.type === "chat" && event.chat.id === id) heading();
    else if (["context", "context deleted"].includes(event.type)) heading();
    else if (event.type === "progress" && event.context === chat()?.context) heading();
  }

  async function ask(text, images) {
    const before = editing;
    asked.add(id);
    await api.post(`/chats/${id}/messages`, { content: text, before, images });
    editing = null;
  }

  heading();
  return {
    node, heard, busy, ask,
    alive: () => its.chats.has(id),
    from: () => chat()?.context,
    title: () => chat()?.title || "New chat",
    shown: () => attempt(load),
    again: load,
    leave: () => (left = true),
    stop: () => api.post(`/chats/${id}/stop`),
    hint: () => {
      if (editing) return "You are editing a question: it takes the place of what is there from it on.";
      const one = context(chat()?.context);
      if (one?.reading && !one.tokens) return "The first files are being read. You can ask as soon as they are.";
      if (one) return "Answers are quotes of what was read, with the lines they stand on.";
      return "Without a context, a model says what it remembers; that may be wrong.";
    },
    placeholder: () => (chat()?.context ? "Ask about what was read…" : "Ask…"),
    bring: async (files) => {
      const now = chat();
      if (now.context) return bringTo(now.context, files);
      const made = await startContext(files);
      its.chats.set(id, await api.patch(`/chats/${id}`, { context: made.id }));
      return bringTo(made.id, files);
    },
  };
}

export async function newChat(context, text, images = []) {
  const chat = await api.post("/chats", { context });
  its.chats.set(chat.id, chat);
  if (text || images.length) {
    asked.add(chat.id);
    await api.post(`/chats/${chat.id}/messages`, { content: text, images });
  }
  go(`#/chat/${chat.id}`);
  return chat;
}
