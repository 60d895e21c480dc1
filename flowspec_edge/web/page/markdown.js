// Markdown as nodes of the page, but for emphasis by underscores, which names in programs have.
// Text stays text, whatever it says: nothing is parsed as HTML, and nothing is loaded.

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const INLINE =
  /(`+)(.+?)\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|(?<![\w*])\*(\S(?:[^*]*\S)?)\*(?!\w)|\[([^\]]*)\]\(([^\s)]+)[^)]*\)|(https?:\/\/[^\s<>"')\]]+)/;

const sources = new WeakMap(); // of nodes, what they were made of

/** Show a text in a node. Blocks that are as they were keep their nodes, for a text that grows. */
export function showMarkdown(parent, text) {
  const blocks = splitBlocks(text.split("\n"));
  blocks.forEach((block, at) => {
    const known = parent.children[at];
    if (known && sources.get(known) === block.source) return;
    const node = makeBlock(block);
    sources.set(node, block.source);
    if (known) known.replaceWith(node);
    else parent.append(node);
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}

function splitBlocks(lines) {
  const blocks = [];
  let at = 0;
  const take = (kind, isWithin, more = {}) => {
    const from = at++;
    while (at < lines.length && isWithin(lines[at], at)) at++;
    blocks.push({ kind, lines: lines.slice(from, at), ...more });
  };
  const begins = (line) => !line.trim() || FENCE.test(line) || HEADING.test(line) || ITEM.test(line) || /^\s{0,3}>/.test(line);
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      take("code", (next) => !next.trim().startsWith(fence[1]));
      at++; // the fence that ends it
    } else if (HEADING.test(line)) take("heading", () => false);
    else if (RULE.test(line)) take("rule", () => false);
    else if (/^\s{0,3}>/.test(line)) take("quote", (next) => next.trim() && !FENCE.test(next));
    else if (ITEM.test(line))
      take("list", (next, to) => (next.trim() ? ITEM.test(next) || /^\s{2,}/.test(next) : ITEM.test(lines[to + 1] ?? "")));
    else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) take("table", (next) => next.includes("|"));
    else take("paragraph", (next) => !begins(next));
  }
  for (const block of blocks) block.source = `${block.kind}\n${block.lines.join("\n")}`;
  return blocks;
}

function makeBlock({ kind, lines }) {
  switch (kind) {
    case "code":
      return element("pre", element("code", lines.slice(1).join("\n")));
    case "heading":
      return withInline("h3", HEADING.exec(lines[0])[2]);
    case "rule":
      return element("hr");
    case "quote": {
      const quote = element("blockquote");
      showMarkdown(quote, lines.map((line) => line.replace(/^\s{0,3}>\s?/, "")).join("\n"));
      return quote;
    }
    case "list":
      return makeList(lines);
    case "table":
      return makeTable(lines);
    default:
      return withInline("p", lines.join("\n"));
  }
}

function makeList(lines) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const list = element(/\d/.test(mark) ? "ol" : "ul");
  if (parseInt(mark, 10) > 1) list.start = parseInt(mark, 10);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) items.push([found[3]]);
    else items.at(-1).push(line.slice(Math.min(indent.length + 2, line.length - line.trimStart().length)));
  }
  for (const [first, ...rest] of items) {
    const item = withInline("li", first);
    if (rest.some((line) => line.trim())) {
      const below = element("div");
      showMarkdown(below, rest.join("\n"));
      item.append(below);
    }
    list.append(item);
  }
  return list;
}

function makeTable(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, name) => element("tr", ...cells(line).map((cell) => withInline(name, cell.trim())));
  return element(
    "table",
    element("thead", row(lines[0], "th")),
    element("tbody", ...lines.slice(2).map((line) => row(line, "td"))),
  );
}

function withInline(name, text) {
  const node = element(name);
  appendInline(node, text);
  return node;
}

function appendInline(parent, text) {
  for (let found = INLINE.exec(text); found; found = INLINE.exec(text)) {
    parent.append(text.slice(0, found.index));
    const [all, , code, strong, em, label, target, url] = found;
    if (code !== undefined) parent.append(element("code", code));
    else if (strong !== undefined) parent.append(withInline("strong", strong));
    else if (em !== undefined) parent.append(withInline("em", em));
    else parent.append(makeLink(target ?? url, label || target || url) ?? all);
    text = text.slice(found.index + all.length);
  }
  parent.append(text);
}

/** A link that is followed only where somebody follows it; null where it leads to no page of the web. */
function makeLink(target, label) {
  if (!/^https?:\/\//i.test(target) || !URL.canParse(target)) return null;
  const link = element("a", label);
  link.href = target;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  link.title = target;
  return link;
}

/** A node with what stands in it: nodes, and texts as they are. */
export function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}
