// What whoever runs the cluster could do: boards that cannot be used, each with the command that mends it, and the line
// by which another board joins.

import { copy, makeButton } from "/page/chat.js";
import { element } from "/page/markdown.js";

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
    parts.push(element("div", element("p", head, advice.join.text), commandOf(advice.join.command)));
  }
  document.getElementById("advice").hidden = !parts.length;
  document.getElementById("advice-list").replaceChildren(...parts);
}

function commandOf(command) {
  const line = element("div", element("code", command), makeButton("Copy", (button) => copy(command, button)));
  line.className = "command";
  return line;
}
