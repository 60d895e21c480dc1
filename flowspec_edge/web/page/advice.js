// What whoever runs the cluster could do: boards that cannot be used, each with the command that mends it, and the line
// by which another board joins.

import { copy, makeButton } from "/page/chat.js";
import { element } from "/page/markdown.js";
import { svg } from "/page/ring.js";

let shown = "";

export function showAdvice(advice) {
  const text = JSON.stringify(advice);
  if (text === shown) return;
  shown = text;
  const parts = (advice.findings ?? []).map(({ node, address, reason, detail, remedy }) => {
    const head = element("strong", `${node || address}: ${reason}`);
    return element("div", element("p", head, `. ${detail}.`), commandOf(remedy));
  });
  if (advice.mdns_error) parts.push(element("p", `mDNS: ${advice.mdns_error}`));
  if (advice.join) {
    const head = element("strong", "Add a board. ");
    const part = element("div", element("p", head, advice.join.text), commandOf(advice.join.command));
    if (advice.join.code) part.append(codeOf(advice.join.code));
    parts.push(part);
  }
  document.getElementById("advice").hidden = !parts.length;
  document.getElementById("advice-list").replaceChildren(...parts);
}

/** A QR code, of rows in which 1 is dark, with the border of four modules that scanners need. */
function codeOf(rows) {
  const code = svg("svg", { class: "code", role: "img", "aria-label": "The line as a QR code" });
  const size = rows.length + 8;
  code.setAttribute("viewBox", `-4 -4 ${size} ${size}`);
  const dark = rows.flatMap((row, y) => [...row].flatMap((module, x) => (module === "1" ? `M${x} ${y}h1v1h-1z` : [])));
  code.append(svg("path", { d: dark.join("") }));
  return code;
}

function commandOf(command) {
  const line = element("div", element("code", command), makeButton("Copy", (button) => copy(command, button)));
  line.className = "command";
  return line;
}
