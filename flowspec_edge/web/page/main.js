// Puts the page together: the dialogue on one side, and what the ring does on the other.

import { showAdvice } from "/page/advice.js";
import { startChat } from "/page/chat.js";
import { followEvents } from "/page/events.js";
import { showCounts, showRates, treeWords } from "/page/figures.js";
import { nameLanes, showLanes, startLanes } from "/page/lanes.js";
import { heardAt, wake } from "/page/motion.js";
import { showFacts, showWays, startRing } from "/page/ring.js";
import { showTree, startTree } from "/page/tree.js";

const WORDS_MS = 500; // between two sentences about the tree
const byId = (id) => document.getElementById(id);
let toldAt = -Infinity;

function showState(kind, text) {
  const state = byId("state");
  if (state.textContent === text && state.dataset.kind === kind) return;
  state.textContent = text;
  state.dataset.kind = kind;
}

function showService(facts) {
  const { service, texts, advice } = facts;
  byId("model").textContent = service.model;
  document.title = `${service.model} – flowspec`;
  const waiting = texts.waiting ? `, ${texts.waiting} waiting` : "";
  if (!service.is_ready) showState("trouble", service.reason);
  else showState("ready", texts.running ? `writing ${texts.running === 1 ? "a text" : `${texts.running} texts`}${waiting}` : "ready");
  nameLanes((service.ring?.stages ?? []).map((stage) => stage.node));
  showFacts(facts);
  showRates(service);
  showAdvice(advice);
}

function showWork(work) {
  heardAt(work.now);
  const [text] = work.texts;
  showTree(text);
  showLanes(work);
  showWays(work.texts);
  showCounts(text, work.now);
  const now = performance.now();
  if (now - toldAt > WORDS_MS || !text) {
    toldAt = now;
    byId("tree-words").textContent = treeWords(work.texts);
  }
}

for (const button of document.querySelectorAll(".tabs button"))
  button.addEventListener("click", () => {
    document.body.dataset.tab = button.dataset.tab;
    for (const other of document.querySelectorAll(".tabs button"))
      other.setAttribute("aria-pressed", String(other === button));
    wake();
  });

startChat();
startTree();
startLanes();
startRing();
followEvents({ service: showService, work: showWork, lost: (reason) => showState("trouble", `${reason}; trying again`) });
