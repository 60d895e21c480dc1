// The draft tree of the text that is written. It flows to the left: behind the root stands the text, before it the
// drafts, each below the row that it would follow. Drafts are outlined; under way they have the colour of the board at
// which they are expected, the stronger the likelier; what the model takes turns green, and what it refuses falls off.

import { clearCanvas, colours, eased, moves, onFrame, shownTime, stageColour, wake } from "/page/motion.js";

const ROW = 23; // pixels between two lanes
const FALL_S = 0.55; // what a refused row takes to fall off
const GROW_S = 0.25; // what a new row takes to appear
const LEAST_CHANCE = 0.01; // of a draft that is shown before it leaves
const KEPT_BEHIND = 28; // positions behind the root
const SPACES = { " ": "␣", "\n": "⏎", "\t": "⇥" };

const nodes = new Map(); // by draft id
const falling = new Set();
let session = null;
let root = null; // the id of the last row of the text
let camera = 0; // the position that is in its place
let ways = [];
let canvas = null;

export function startTree() {
  canvas = document.getElementById("tree-canvas");
  onFrame(draw);
}

/** Take in what a text is at; null where none is written. */
export function showTree(text) {
  if (!text) {
    ways = [];
    for (const node of nodes.values()) if (isDraft(node)) leave(node);
    wake();
    return;
  }
  const first = text.position - text.text.length + 1;
  const isElsewhere = text.text.some(([id], at) => nodes.has(id) && nodes.get(id).position !== first + at);
  if (text.session !== session || isElsewhere) begin(text); // a ring that was opened anew counts anew
  const known = new Set();
  text.text.forEach(([id, word], at) => {
    const node = nodes.get(id) ?? add(id, text.text[at - 1]?.[0], first + at, word);
    node.state = at + first < text.num_prompt ? "prompt" : node.state === "text" ? "text" : accept(node);
    known.add(id);
  });
  root = text.text.at(-1)?.[0] ?? null;
  const { ids, parents, words, positions, is_sent: sent, chances } = text.drafts;
  ids.forEach((id, at) => {
    const node = nodes.get(id) ?? add(id, parents[at], positions[at], words[at]);
    node.state = sent[at] ? "sent" : "draft";
    node.chance = chances[at];
    known.add(id);
  });
  for (const node of nodes.values())
    if (!known.has(node.id) && (isDraft(node) || node.position < text.position - KEPT_BEHIND)) leave(node);
  giveLanes(ids);
  ways = text.ways.map(([rows, sentAt, begins, ends]) => ({ rows, sentAt, begins, ends }));
  wake();
}

const isDraft = (node) => node.state === "draft" || node.state === "sent";

function begin(text) {
  nodes.clear();
  falling.clear();
  session = text.session;
  camera = text.position;
}

function add(id, parent, position, word) {
  const label = [...word].some((sign) => !(sign in SPACES)) ? word.trim() : [...word].map((sign) => SPACES[sign]).join("");
  const node = { id, parent, position, label, lane: null, drawn: null, state: "draft", chance: 1, age: 0, green: 0 };
  nodes.set(id, node);
  return node;
}

function accept(node) {
  node.green = node.age ? 1 : 0.5; // less where nobody had drafted it
  return "text";
}

/** Rows that travelled for nothing fall off; others were never in the way of anything. */
function leave(node) {
  nodes.delete(node.id);
  if (node.state === "sent" && node.drawn !== null && moves()) falling.add({ ...node, left: FALL_S, drop: 0, speed: 0 });
}

/** The text is in the middle. Of the children of a row the first one goes on in its lane, others beside it. */
function giveLanes(ids) {
  const most = Math.max(Math.floor(canvas.clientHeight / ROW / 2 - 0.5), 2); // on each side
  const taken = new Set();
  const isFree = (position, lane) => Math.abs(lane) <= most && !taken.has(`${position} ${lane}`);
  for (const node of nodes.values()) if (!isDraft(node)) node.lane = 0;
  for (const id of ids) {
    const node = nodes.get(id);
    const wanted = nodes.get(node.parent)?.lane ?? null;
    const isSeen = wanted !== null && (node.state === "sent" || node.chance >= LEAST_CHANCE);
    const lanes = isSeen ? [wanted, ...(node.lane === null ? [] : [node.lane])] : [];
    for (let away = 1; isSeen && away <= 2 * most; away++) lanes.push(wanted + away, wanted - away);
    node.lane = lanes.find((lane) => isFree(node.position, lane)) ?? null;
    if (node.lane !== null) taken.add(`${node.position} ${node.lane}`);
  }
  for (const node of nodes.values())
    if (node.lane === null) node.drawn = null;
    else node.drawn ??= nodes.get(node.parent)?.drawn ?? node.lane; // it comes out of the row before it
}

// --------------------------------------------------------------------- drawing

function draw(passed) {
  const view = clearCanvas(canvas);
  const now = shownTime();
  const isMoving = age(passed);
  if (!view) return isMoving;
  const { context, width, height } = view;
  const step = width < 480 ? 62 : 78;
  const x = (position) => width * 0.36 + (position - camera) * step;
  const y = (lane) => height / 2 + lane * ROW;
  context.font = '12px ui-monospace, "SF Mono", "Cascadia Code", "DejaVu Sans Mono", monospace';
  context.textBaseline = "middle";
  context.textAlign = "center";
  const places = placesAt(now);
  const shown = [...nodes.values()].filter((node) => node.drawn !== null && x(node.position) > -step);
  for (const node of falling) drawRow(context, node, x(node.position), y(node.drawn) + node.drop, step);
  for (const node of shown) drawEdge(context, node, x, y, step);
  for (const node of shown) drawRow(context, node, x(node.position), y(node.drawn), step, places.get(node.id));
  return isMoving || ways.length > 0;
}

/** Let time pass for all that moves; whether something still does. */
function age(passed) {
  const goal = nodes.get(root)?.position ?? camera;
  let isMoving = Math.abs(goal - camera) > 0.002;
  camera = eased(camera, goal, passed, 0.12);
  for (const node of nodes.values()) {
    if (node.age < 1) isMoving = true;
    node.age = moves() ? Math.min(node.age + passed / GROW_S, 1) : 1;
    if (node.drawn !== null) {
      if (Math.abs(node.lane - node.drawn) > 0.01) isMoving = true;
      node.drawn = eased(node.drawn, node.lane, passed, 0.1);
    }
    if (node.state === "text" && node.green > 0) {
      node.green = Math.max(node.green - passed / 2.5, 0);
      isMoving = true;
    }
  }
  for (const node of falling) {
    node.left -= passed;
    if (node.left <= 0) falling.delete(node);
    node.drop += (node.speed += 420 * passed) * passed;
    isMoving = true;
  }
  return isMoving;
}

/** At which stage each row under way is expected, by its id. */
function placesAt(now) {
  const places = new Map();
  for (const { rows, ends } of ways) {
    const passed = ends.findIndex((end) => end > now);
    const place = passed === -1 ? Math.max(ends.length - 1, 0) : passed;
    for (const id of rows) places.set(id, place);
  }
  return places;
}

function drawEdge(context, node, x, y, step) {
  const above = nodes.get(node.parent);
  if (!above || above.drawn === null) return;
  const from = x(above.position) + step * 0.4;
  const to = x(node.position) - step * 0.4;
  const isText = node.state === "text" || node.state === "prompt";
  context.globalAlpha = (isText ? 0.9 : 0.25 + 0.6 * node.chance) * node.age;
  context.strokeStyle = isText ? colours.accent : colours.draft;
  context.lineWidth = isText ? 2 : 1;
  context.beginPath();
  context.moveTo(from, y(above.drawn));
  context.bezierCurveTo(from + 9, y(above.drawn), to - 9, y(node.drawn), to, y(node.drawn));
  context.stroke();
}

/** A row as a pill with its word. `stage` is where it is expected, where it is under way. */
function drawRow(context, node, x, y, step, stage) {
  const width = node.label ? step * 0.8 : ROW * 0.5;
  const height = ROW - 5;
  const strength = Math.sqrt(node.chance);
  const look = appearance(node, stage, strength);
  const fade = node.left ? (node.left / FALL_S) * 0.6 : node.age;
  context.beginPath();
  context.roundRect(x - width / 2, y - height / 2, width, height, height / 2.2);
  if (look.fill) {
    context.globalAlpha = look.strength * fade;
    context.fillStyle = look.fill;
    context.fill();
  }
  if (look.border) {
    context.globalAlpha = fade * (look.borderStrength ?? 1);
    context.strokeStyle = look.border;
    context.lineWidth = 1.25;
    context.setLineDash(node.left ? [3, 3] : []);
    context.stroke();
    context.setLineDash([]);
  }
  if (!node.label) return;
  context.globalAlpha = fade * (look.textStrength ?? 1);
  context.fillStyle = look.text;
  context.fillText(fitted(node.label, width), x, y + 0.5);
}

function appearance(node, stage, strength) {
  if (node.left) return { border: colours.refused, text: colours.refused };
  switch (node.state) {
    case "prompt":
      return { text: colours.faint };
    case "text": {
      const isRoot = node.id === root;
      return { fill: colours["accent-soft"], strength: 0.55 + 0.45 * node.green, text: colours.accent, border: isRoot || node.green ? colours.accent : null, borderStrength: isRoot ? 1 : node.green };
    }
    case "sent": {
      const colour = stage === undefined ? colours.head : stageColour(stage);
      const isStrong = strength > 0.65;
      return { fill: colour, strength: 0.12 + 0.88 * strength, border: colour, borderStrength: 0.8, text: isStrong ? colours.sheet : colours.ink };
    }
    default:
      return { border: colours.draft, borderStrength: 0.35 + 0.65 * strength, text: colours.faint, textStrength: 0.5 + 0.5 * strength };
  }
}

function fitted(label, width) {
  const most = Math.floor((width - 8) / 7.3);
  return label.length > most ? `${label.slice(0, Math.max(most - 1, 1))}…` : label;
}
