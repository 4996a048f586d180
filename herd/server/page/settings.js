// How answers are made, how the page looks, and copies of everything.

import * as api from "/page/api.js";
import { attempt, its } from "/page/app.js";
import { dialog, el, field, plural, say } from "/page/dom.js";

const NUMBERS = [
  ["max_tokens", "Longest answer", "tokens; empty: 1,024", { min: 1, max: 1 << 20, step: 1 }],
  ["temperature", "Temperature", "empty or 0: always the likeliest token; about 0.7 varies", { min: 0, max: 5, step: "any" }],
  ["top_p", "Top p", "only the likeliest tokens that hold this probability", { min: 0.001, max: 1, step: "any" }],
  ["top_k", "Top k", "only so many of the likeliest tokens; 0: all", { min: 0, max: 1 << 20, step: 1 }],
  ["min_p", "Min p", "leaves out tokens below this share of the likeliest", { min: 0, max: 1, step: "any" }],
  ["repetition_penalty", "Repetition penalty", "above 1: what was said is less likely", { min: 0.01, max: 10, step: "any" }],
  ["seed", "Seed", "makes draws repeatable", { min: 0, max: 2 ** 53 - 1, step: 1 }],
];

export async function openSettings() {
  const now = its.settings;
  const theme = el("select", { id: "theme", name: "theme" },
    ...[["", "As the system"], ["light", "Light"], ["dark", "Dark"]].map(([value, text]) => el("option", { value, selected: (now.theme || "") === value }, text)));
  const pick = el("input", { type: "file", id: "import", accept: ".zip", onchange: () => bring(pick.files[0]) });
  const form = await dialog("Settings", "Save",
    el("p", { class: "note" }, "Answers from a context are quotes: of these settings, only the longest answer counts there."),
    field("Instructions", { tag: "textarea", name: "system", rows: 3, value: now.system || "", maxLength: 100000 }, "stand before every chat without a context"),
    ...NUMBERS.map(([name, label, note, limits]) => field(label, { type: "number", name, value: now[name] ?? "", ...limits }, note)),
    el("p", { class: "field" }, el("label", { htmlFor: "theme" }, "Look"), theme),
    el("p", { class: "row" }, el("a", { class: "button", href: "/api/export", download: "herd.zip" }, "Export everything"),
      el("label", { htmlFor: "import" }, "Import"), pick));
  if (!form) return;
  const number = (name) => (form.get(name) === "" ? null : Number(form.get(name)));
  const values = Object.fromEntries(NUMBERS.map(([name]) => [name, number(name)]));
  await attempt(async () => {
    its.settings = await api.put("/settings", { ...values, system: form.get("system") || null, theme: form.get("theme") || null });
    say("Settings are saved.");
  });
}

async function bring(file) {
  if (!file) return;
  const form = new FormData();
  form.append("file", file);
  document.getElementById("dialog").close();
  const found = await attempt(() => api.post("/import", form));
  if (found) say(`Imported ${plural(found.chats, "chat")} and ${plural(found.contexts, "context")}.`);
}
