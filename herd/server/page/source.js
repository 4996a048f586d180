// A source beside the chat, at the lines that carried an answer.

import * as api from "/page/api.js";
import { attempt } from "/page/app.js";
import { $, count, el } from "/page/dom.js";
import { highlight } from "/page/markdown.js";

let opener = null;

export async function openSource(context, name, first, last) {
  const from = document.activeElement;
  const found = await attempt(() => api.get(`/contexts/${context}/source?name=${encodeURIComponent(name)}&line=${first}`));
  if (!found) return;
  opener = from;
  const kind = name.split(".").pop();
  // A string or comment may span lines, so all of it is looked at, and then cut into lines.
  const lines = [[]];
  for (const node of highlight(found.lines.join("\n"), kind)) {
    const text = typeof node === "string" ? node : node.textContent;
    text.split("\n").forEach((part, n) => {
      if (n) lines.push([]);
      if (part) lines.at(-1).push(typeof node === "string" ? part : el("span", { class: node.className }, part));
    });
  }
  const list = el("ol", { start: found.first }, ...lines.slice(0, found.lines.length).map((parts, n) => {
    const line = found.first + n, cited = line >= first && line <= last;
    return el("li", { id: `line${line}`, class: cited ? "cited" : undefined }, cited ? el("mark", {}, ...parts) : el("span", {}, ...parts));
  }));
  list.style.setProperty("--digits", String(found.last).length);
  $("source-title").textContent = name;
  const end = found.first + found.lines.length - 1, all = found.first === 1 && end === found.last;
  $("source-note").textContent = all ? `${count(found.last)} lines, as they were read` : `lines ${count(found.first)}–${count(end)} of ${count(found.last)}, as they were read`;
  $("lines").replaceChildren(list);
  $("source").hidden = false;
  document.body.classList.add("with-source");
  from?.scrollIntoView({ block: "nearest" }); // the chat is narrower now, and longer
  const target = last ? $(`line${first}`) : null;
  if (target) target.scrollIntoView({ block: "center" });
  else $("lines").scrollTop = 0;
  $("source-title").focus({ preventScroll: true });
}

export function closeSource() {
  if ($("source").hidden) return;
  $("source").hidden = true;
  $("lines").replaceChildren();
  document.body.classList.remove("with-source");
  if (opener?.isConnected) opener.focus();
}
