// The ring: origin and boards with their layers and load, links between them, and chunks on their way around.

import { moves, onFrame, shownTime, stageVariable, wake } from "/page/motion.js";
import { element } from "/page/markdown.js";

const SVG = "http://www.w3.org/2000/svg";
const RADIUS = 21;
const BACK_S = 20; // how long a board that is back is said to be

const byId = (id) => document.getElementById(id);
let picture = null;
let dots = [];
let links = []; // the paths, in the order of the hops
let ways = [];
let drawnFor = "";
let before = null; // the facts before these, for what a board did since
let busy = new Map(); // by board, the share of the last second
const wasLost = new Set();
const backAt = new Map();

export function startRing() {
  picture = byId("ring-picture");
  onFrame(moveDots);
  new ResizeObserver(() => {
    drawnFor = "";
    if (before) drawRing(before.service);
  }).observe(picture.parentElement);
}

export function showFacts(facts) {
  const { service } = facts;
  busy = busyShares(before, facts);
  before = facts;
  drawRing(service);
  showOthers(service);
  showTable(service);
}

export function showWays(texts) {
  ways = texts.flatMap((text) => text.ways.map(([rows, sentAt, begins, ends]) => ({ num: rows.length, sentAt, begins, ends })));
  wake();
}

/** The share of the time between two looks in which each stage computed; none where the ring is another one. */
function busyShares(earlier, { at, service }) {
  const shares = new Map();
  for (const { node, work } of service.ring?.stages ?? []) {
    const known = earlier?.service.ring?.stages.find((stage) => stage.node === node);
    if (known && work.busy_s >= known.work.busy_s)
      shares.set(node, Math.min((work.busy_s - known.work.busy_s) / (at - earlier.at), 1));
  }
  return shares;
}

// --------------------------------------------------------------------- picture

function drawRing(service) {
  const stages = service.ring?.stages ?? [];
  const width = picture.parentElement.clientWidth - 8;
  byId("ring-words").textContent = ringWords(service, stages);
  picture.toggleAttribute("hidden", !stages.length);
  if (!stages.length || width < 100) return;
  const signature = JSON.stringify([width, service.origin, service.ring.hops, stages.map((stage) => [stage.node, stage.start, stage.stop])]);
  if (signature !== drawnFor) {
    drawnFor = signature;
    layOut(service, stages, width);
  }
  stages.forEach((stage, at) => {
    const share = busy.get(stage.node) ?? 0;
    picture.querySelector(`[data-load="${at}"]`).setAttribute("stroke-dasharray", `${share * 100} 100`);
    const board = service.boards.find((found) => found.node === stage.node);
    const heat = sensed(board).map((said) => ` · ${said}`).join("");
    picture.querySelector(`[data-facts="${at}"]`).textContent = `${stage.arithmetic.split(" ")[0]}${heat}`;
  });
}

function sensed(board) {
  const heat = board?.temperature_c == null ? [] : [`${board.temperature_c} °C`];
  return board?.watts == null ? heat : [...heat, `${board.watts.toFixed(1)} W`];
}

function ringWords(service, stages) {
  if (!stages.length) return service.reason || "No ring is open.";
  const hop = service.ring.hop_ms == null ? "" : `, a hop takes ${number(service.ring.hop_ms)} ms`;
  return `${stages.length === 1 ? "One board" : `${stages.length} boards`} in turn${hop}. Drafts: ${service.drafts}.`;
}

function layOut(service, stages, width) {
  const num = stages.length + 1;
  const isNarrow = width < 520;
  const height = isNarrow ? Math.max(300, 62 * num) : 300;
  const [middle, half] = [width / 2, height / 2 - 4];
  const [across, down] = [width / 2 - (isNarrow ? 72 : 120), height / 2 - 58];
  const angle = (at) => -Math.PI / 2 + (2 * Math.PI * at) / num;
  const point = (turn) => [middle + across * Math.cos(turn), half + down * Math.sin(turn)];
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  picture.replaceChildren();
  links = Array.from({ length: num }, (_, at) => {
    const [[fromX, fromY], [toX, toY]] = [point(angle(at)), point(angle(at + 1))];
    const path = add("path", { class: "link", d: `M${fromX} ${fromY} A${across} ${down} 0 0 1 ${toX} ${toY}` });
    const hop = service.ring.hops[at];
    if (hop && !isNarrow) {
      const [x, y] = point(angle(at + 0.5));
      add("text", { class: "small", x: middle + (x - middle) * 0.82, y: half + (y - half) * 0.7 + 4 }, hopWords(hop));
    }
    return path;
  });
  dots = Array.from({ length: 24 }, () => add("circle", { r: 0, cx: -9, cy: -9 })); // boards are drawn over them
  [{ node: service.origin }, ...stages].forEach((stage, at) => {
    const [x, y] = point(angle(at));
    add("circle", { class: at ? "board" : "board origin", cx: x, cy: y, r: RADIUS });
    if (at) {
      const load = add("circle", { class: "load", cx: x, cy: y, r: RADIUS, pathLength: 100 });
      load.style.stroke = stageVariable(at - 1);
      load.dataset.load = at - 1;
      load.setAttribute("transform", `rotate(-90 ${x} ${y})`);
      add("text", { x, y: y + 4.5 }, `${stage.start}–${stage.stop - 1}`);
    } else add("text", { x, y: y + 4.5 }, "draft");
    const isAbove = y < half - 10;
    const below = isAbove ? y - RADIUS - (at ? 25 : 10) : y + RADIUS + 18;
    add("text", { x, y: below }, at ? shortened(stage.node, isNarrow ? 14 : 24) : "origin");
    if (at) add("text", { class: "small", x, y: below + 15 }).dataset.facts = at - 1;
  });
}

function add(name, attributes, text = "") {
  const node = svg(name, attributes);
  node.textContent = text;
  picture.append(node);
  return node;
}

export function svg(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const hopWords = ([, , latency, rate]) =>
  `${number(latency)} ms${rate == null ? "" : ` · ${rate >= 1000 ? `${number(rate / 1000)} Gbit/s` : `${number(rate)} Mbit/s`}`}`;
const number = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const shortened = (name, most) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);

/** Chunks between two boards are dots on their link, larger where they have more rows. */
function moveDots() {
  const now = shownTime();
  const places = moves() ? ways.map((way) => placeOf(way, now)).filter(Boolean) : [];
  dots.forEach((dot, at) => {
    const place = places[at];
    dot.setAttribute("r", place ? 3 + Math.min(Math.sqrt(place.num), 5) : 0);
    if (!place || !links[place.hop]) return;
    const path = links[place.hop];
    const { x, y } = path.getPointAtLength(path.getTotalLength() * place.share);
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y);
    dot.style.fill = place.hop < links.length - 1 ? stageVariable(place.hop) : "var(--accent)";
  });
  return ways.length > 0 && moves();
}

function placeOf({ num, sentAt, begins, ends }, now) {
  const lefts = [sentAt, ...ends];
  const arrives = [...begins, (ends.at(-1) ?? sentAt) + 0.05];
  for (let hop = 0; hop < lefts.length; hop++) {
    if (now < lefts[hop]) return null; // at a board
    if (now < arrives[hop]) return { hop, num, share: (now - lefts[hop]) / Math.max(arrives[hop] - lefts[hop], 0.01) };
  }
  return null;
}

// --------------------------------------------------------------------- in words

function showOthers(service) {
  const now = performance.now() / 1000;
  for (const node of wasLost) {
    if (service.lost.includes(node)) continue;
    wasLost.delete(node);
    backAt.set(node, now);
  }
  for (const node of service.lost) wasLost.add(node);
  const serving = new Set(service.ring?.stages.map((stage) => stage.node));
  const items = [];
  const tell = (kind, text) => {
    const item = element("li", text);
    item.dataset.kind = kind;
    items.push(item);
  };
  for (const node of service.lost) tell("lost", `${node} is lost; the ring does without it until it answers`);
  for (const [node, at] of backAt) if (now - at < BACK_S) tell("back", `${node} is back`);
  for (const { node, num_bytes: num, total_bytes: total } of service.fetches)
    tell("fetching", `${node} fetches layers: ${Math.floor((100 * num) / total)} % of ${(total / 1e6).toFixed(0)} MB`);
  for (const { node, state } of service.boards)
    if (!serving.has(node) && !service.lost.includes(node)) tell("spare", `${node}: ${state === "ready" ? "not in the ring" : state}`);
  const list = byId("others");
  const isSame = items.length === list.children.length && items.every((item, at) => item.textContent === list.children[at].textContent);
  if (!isSame) list.replaceChildren(...items);
}

function showTable(service) {
  const boards = new Map(service.boards.map((board) => [board.node, board]));
  const rows = (service.ring?.stages ?? []).map((stage) => {
    const { work } = stage;
    const board = boards.get(stage.node);
    const share = busy.get(stage.node);
    return [
      stage.node,
      `${stage.start} to ${stage.stop - 1}`,
      stage.arithmetic.split(" ")[0],
      share === undefined ? "–" : `${Math.round(100 * share)} %`,
      work.num_chunks ? `${number((1000 * work.waited_s) / work.num_chunks)} ms` : "–",
      sensed(board).join(", ") || "–",
      board?.free_memory_bytes == null ? "–" : `${Math.round(board.free_memory_bytes / 2 ** 20)} MiB`,
    ];
  });
  byId("boards").tBodies[0].replaceChildren(
    ...rows.map(([name, ...cells]) => {
      const head = element("th", name);
      head.scope = "row";
      return element("tr", head, ...cells.map((cell) => element("td", cell)));
    }),
  );
}
