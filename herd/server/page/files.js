// Files that are dropped or chosen, with their paths from the folder on.

import { $ } from "/page/dom.js";

const fromInput = (input) => [...input.files].map((file) => ({ name: file.webkitRelativePath || file.name, file }));

// Lets a person choose; no files where they do not.
export function choose(kind) {
  const input = $(`pick-${kind}`);
  return new Promise((resolve) => {
    input.onchange = () => {
      resolve(fromInput(input));
      input.value = "";
    };
    input.oncancel = () => resolve([]);
    input.click();
  });
}

// What a context of these files is called: their folder, or the first of them.
export function nameOf(files) {
  const folders = new Set(files.map((one) => (one.name.includes("/") ? one.name.split("/")[0] : "")));
  const [folder] = folders;
  if (folders.size === 1 && folder) return folder.slice(0, 200);
  return (files.length === 1 ? files[0].name : `${files[0].name} and ${files.length - 1} more`).slice(0, 200);
}

const entriesOf = (reader) => new Promise((resolve, reject) => reader.readEntries(resolve, reject));
const fileOf = (entry) => new Promise((resolve, reject) => entry.file(resolve, reject));

async function walk(entry, path, found) {
  if (entry.isFile) found.push({ name: path + entry.name, file: await fileOf(entry) });
  if (!entry.isDirectory || [".git", ".hg", ".svn"].includes(entry.name)) return;
  const reader = entry.createReader();
  for (let entries = await entriesOf(reader); entries.length; entries = await entriesOf(reader)) {
    for (const one of entries) await walk(one, `${path}${entry.name}/`, found);
  }
}

async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const found = [];
  for (const entry of entries) await walk(entry, "", found);
  return found.length || entries.length ? found : [...transfer.files].map((file) => ({ name: file.name, file }));
}

// Files may be dropped and pasted anywhere on the page.
export function bringDrops(bring) {
  let depth = 0;
  const shown = (yes) => ($("drop").hidden = !yes);
  const files = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (files(event)) depth++, shown(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (files(event) && --depth <= 0) shown(false);
  });
  document.addEventListener("dragover", (event) => files(event) && event.preventDefault());
  document.addEventListener("drop", async (event) => {
    if (!files(event)) return;
    event.preventDefault();
    depth = 0;
    shown(false);
    bring(await dropped(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files || [])].map((file) => ({ name: file.name, file }));
    if (pasted.length && !$("dialog").open) event.preventDefault(), bring(pasted);
  });
}
