// Markdown → nodes. Only nodes and text are made, links lead to the web or to mail, and nothing is loaded.

import { el } from "/page/dom.js";

const INLINE = new RegExp([
  "(`+)(?<code>.+?)\\1(?!`)",
  "!?\\[(?<label>[^\\]\\n]*)\\]\\((?<href>[^()\\s]*(?:\\([^()\\s]*\\)[^()\\s]*)*)\\)",
  "\\*\\*(?=\\S)(?<strong>.+?\\S?)\\*\\*",
  "(?<![\\w*])\\*(?=[^\\s*])(?<em>[^*\\n]*[^\\s*])\\*(?![\\w*])",
  "(?<![\\w_])_(?=[^\\s_])(?<em2>[^_\\n]*[^\\s_])_(?![\\w_])",
  "~~(?<del>[^~\\n]+)~~",
  "(?<url>https?:\\/\\/[^\\s<>\"'`]+[^\\s<>\"'`.,:;!?)\\]])",
  "\\\\(?<escaped>[\\\\`*_{}\\[\\]()#+.!~|>-])",
].join("|"), "s");

function link(href, ...children) {
  let url;
  try {
    url = new URL(href);
  } catch {
    return el("span", {}, ...children);
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return el("span", {}, ...children);
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

function inline(text, depth = 0) {
  const nodes = [];
  while (text) {
    const found = depth < 6 ? INLINE.exec(text) : null;
    if (!found) {
      nodes.push(text);
      break;
    }
    if (found.index) nodes.push(text.slice(0, found.index));
    const { code, label, href, strong, em, em2, del, url, escaped } = found.groups;
    if (code !== undefined) nodes.push(el("code", {}, code.trim() || code));
    else if (href !== undefined) nodes.push(link(href, ...inline(label || href, depth + 1)));
    else if (strong !== undefined) nodes.push(el("strong", {}, ...inline(strong, depth + 1)));
    else if (em !== undefined || em2 !== undefined) nodes.push(el("em", {}, ...inline(em ?? em2, depth + 1)));
    else if (del !== undefined) nodes.push(el("del", {}, ...inline(del, depth + 1)));
    else if (url !== undefined) nodes.push(link(url, url));
    else nodes.push(escaped);
    text = text.slice(found.index + found[0].length);
  }
  return nodes;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line), heading = HEADING.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      const end = lines.findIndex((other, n) => n > at && other.trim().startsWith(fence[1]) && !other.trim().slice(fence[1].length).replaceAll(fence[1][0], ""));
      const stop = end < 0 ? lines.length : end;
      nodes.push(code(lines.slice(at + 1, stop).join("\n"), fence[2]));
      at = stop + 1;
    } else if (heading) {
      // The page has headings of its own above these.
      nodes.push(el(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2])));
      at++;
    } else if (RULE.test(line)) {
      nodes.push(el("hr"));
      at++;
    } else if (QUOTE.test(line) && depth < 8) {
      const from = at;
      while (at < lines.length && QUOTE.test(lines[at])) at++;
      nodes.push(el("blockquote", {}, ...blocks(lines.slice(from, at).map((l) => QUOTE.exec(l)[1]), depth + 1)));
    } else if (ITEM.test(line) && depth < 8) at = list(lines, at, depth, nodes);
    else if (line.includes("|") && at + 1 < lines.length && DIVIDER.test(lines[at + 1])) at = table(lines, at, nodes);
    else {
      const from = at++;
      while (at < lines.length && lines[at].trim() && ![FENCE, HEADING, QUOTE, ITEM, RULE].some((p) => p.test(lines[at]))) at++;
      nodes.push(el("p", {}, ...inline(lines.slice(from, at).join("\n"))));
    }
  }
  return nodes;
}

function list(lines, at, depth, nodes) {
  const first = ITEM.exec(lines[at]);
  const indent = first[1].length, ordered = first[2] !== undefined;
  const node = el(ordered ? "ol" : "ul", ordered ? { start: Number(first[2]) } : {});
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length !== indent || (item[2] !== undefined) !== ordered) break;
    const inner = [item[3]];
    at++;
    while (at < lines.length && (lines[at].trim() ? /^\s*/.exec(lines[at])[0].length > indent : /^\s{2,}\S/.test(lines[at + 1] || ""))) {
      inner.push(lines[at].slice(Math.min(indent + (ordered ? 3 : 2), /^\s*/.exec(lines[at])[0].length)));
      at++;
    }
    const body = blocks(inner, depth + 1);
    node.append(el("li", {}, ...(body[0]?.tagName === "P" ? [...body[0].childNodes, ...body.slice(1)] : body)));
    while (at < lines.length && !lines[at].trim() && ITEM.exec(lines[at + 1] || "")?.[1].length === indent) at++;
  }
  nodes.push(node);
  return at;
}

function table(lines, at, nodes) {
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell) => el(tag, {}, ...inline(cell))));
  const head = row(lines[at], "th"), body = [];
  for (at += 2; at < lines.length && lines[at].includes("|") && lines[at].trim(); at++) body.push(row(lines[at], "td"));
  nodes.push(el("div", { class: "wide", tabIndex: 0, role: "region", "aria-label": "Table" },
    el("table", {}, el("thead", {}, head), el("tbody", {}, ...body))));
  return at;
}

const WORDS = new Set(`and as assert async await bool break case catch char class const continue def default del do
double elif else end enum except export extends extern false False final finally float fn for from func function global
go if impl implements import in include int interface is lambda let local long loop match mod module mut namespace new
nil None nonlocal not null or package pass pub private protected public raise ref return self static string struct
super switch template then this throw trait True true try type typedef typeof union unsigned use using val var void
where while with yield select insert update delete create table join group order by limit set values into`.split(/\s+/));
const HASH = /^(py|python|sh|bash|zsh|rb|ruby|yaml|yml|toml|r|perl|make|makefile|dockerfile)?$/i;
const TOKENS = (hash) => new RegExp([
  `(?<comment>\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?(?:\\*\\/|$)${hash ? "|(?<![\\w$])#[^\\n]*" : ""})`,
  "(?<string>\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)|\"(?:[^\"\\\\\\n]|\\\\.)*\"?|'(?:[^'\\\\\\n]|\\\\.)*'?|`(?:[^`\\\\]|\\\\.)*`?)",
  "(?<number>\\b(?:0[xX][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)",
  "(?<word>[A-Za-z_]\\w*)",
].join("|"), "g");

// Comments, strings, numbers and the words that most languages share.
export function highlight(text, language = "") {
  const nodes = [];
  let at = 0;
  const add = (from, to, kind) => {
    if (to > from) nodes.push(kind ? el("span", { class: `code-${kind}` }, text.slice(from, to)) : text.slice(from, to));
  };
  for (const found of text.length < 200_000 ? text.matchAll(TOKENS(HASH.test(language))) : []) {
    const { comment, string, number, word } = found.groups;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : WORDS.has(word) ? "word" : "";
    if (!kind) continue;
    add(at, found.index, "");
    at = found.index + found[0].length;
    add(found.index, at, kind);
  }
  add(at, text.length, "");
  return nodes;
}

function code(text, language) {
  const copy = el("button", { type: "button", class: "quiet", onclick: () => navigator.clipboard.writeText(text).then(() => {
    copy.textContent = "Copied";
  }) }, "Copy");
  const label = language ? `Code in ${language}` : "Code";
  return el("figure", {}, el("figcaption", {}, el("span", {}, language), copy),
    el("pre", { tabIndex: 0, role: "region", "aria-label": label }, el("code", {}, ...highlight(text, language))));
}
