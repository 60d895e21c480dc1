// The draft tree of the text that is written. It flows to the left: behind the root stands the text, before it the
// drafts, each below the row that it would follow. Drafts are outlined; under way they have the colour of the board at
// which they are expected, the stronger the likelier; what the model takes turns green, and what it refuses falls off.

import { clearCanvas, colours, eased, moves, onFrame, shownTime, stageColour, wake } from "/page/motion.js";

const LANES = 7; // above the root's lane, and below it
const ROW = 23; // pixels between two lanes
const FALL_S = 0.7; // what a refused row takes to fall off
const GROW_S = 0.25; // what a new row takes to appear
const KEPT_BEHIND = 28; // positions behind the root
const SPACES = { " ": "␣", "\n": "⏎", "\t": "⇥" };

const nodes = new Map(); // by draft id
const falling = new Set();
const taken = new Set(); // "position lane" that a row has
let session = null;
let root = null; // the id of the last row of the text
let camera = { position: 0, lane: 0 };
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
    for (const node of [...nodes.values()]) if (node.state === "draft" || node.state === "sent") leave(node, false);
    wake();
    return;
  }
  if (text.session !== session) begin(text);
  const known = new Set();
  const first = text.position - text.text.length + 1;
  text.text.forEach(([id, word], at) => {
    const node = nodes.get(id) ?? add(id, text.text[at - 1]?.[0], first + at, word);
    node.state = at + first < text.num_prompt ? "prompt" : node.state === "text" ? "text" : accept(node);
    known.add(id);
  });
  root = text.text.at(-1)?.[0] ?? null;
  const { ids, parents, tokens, positions, is_sent: sent, chances } = text.drafts;
  ids.forEach((id, at) => {
    const node = nodes.get(id) ?? add(id, parents[at], positions[at], tokens[at]);
    node.state = sent[at] ? "sent" : "draft";
    node.chance = chances[at];
    known.add(id);
  });
  for (const [id, node] of nodes) {
    if (known.has(id)) continue;
    if (node.state === "draft" || node.state === "sent") leave(node, node.state === "sent");
    else if (node.position < text.position - KEPT_BEHIND) remove(node);
  }
  ways = text.ways.map(([rows, sentAt, begins, ends]) => ({ rows, sentAt, begins, ends }));
  wake();
}

function begin(text) {
  for (const node of [...nodes.values()]) leave(node, false);
  session = text.session;
  camera = { position: text.position, lane: 0 };
}

function add(id, parent, position, word) {
  const above = nodes.get(parent);
  const lane = freeLane(position, above?.lane ?? 0);
  const label = [...word].some((sign) => !(sign in SPACES)) ? word.trim() : [...word].map((sign) => SPACES[sign]).join("");
  const node = { id, parent, position, lane, label, state: "draft", chance: 1, age: 0, green: 0, drawn: above?.drawn ?? lane };
  if (lane !== null) taken.add(`${position} ${lane}`);
  nodes.set(id, node);
  return node;
}

/** The lane nearest to the wanted one that no row has at this position; null where there is none. */
function freeLane(position, wanted) {
  for (let away = 0; away <= 2 * LANES; away++) {
    const side = away % 2 ? Math.ceil(away / 2) : -away / 2;
    if (!taken.has(`${position} ${wanted + side}`)) return wanted + side;
  }
  return null;
}

function accept(node) {
  node.green = node.state === "sent" || node.state === "draft" ? 1 : 0.5;
  return "text";
}

function remove(node) {
  nodes.delete(node.id);
  taken.delete(`${node.position} ${node.lane}`);
}

function leave(node, isRefused) {
  remove(node);
  if (node.lane === null) return;
  falling.add({ ...node, isRefused, left: FALL_S, drop: 0, speed: 0 });
}

// --------------------------------------------------------------------- drawing

function draw(passed) {
  const view = clearCanvas(canvas);
  const now = shownTime();
  const isMoving = age(passed);
  if (!view) return isMoving;
  const { context, width, height } = view;
  const step = width < 480 ? 62 : 78;
  const x = (position) => width * 0.36 + (position - camera.position) * step;
  const y = (lane) => height / 2 + (lane - camera.lane) * ROW;
  context.font = '12px ui-monospace, "SF Mono", "Cascadia Code", "DejaVu Sans Mono", monospace';
  context.textBaseline = "middle";
  context.textAlign = "center";
  const places = placesAt(now);
  const shown = [...nodes.values()].filter((node) => node.lane !== null && x(node.position) > -step);
  for (const node of shown) drawEdge(context, node, x, y, step);
  for (const node of shown) drawRow(context, node, x(node.position), y(node.drawn), step, places.get(node.id));
  for (const node of falling) drawRow(context, node, x(node.position), y(node.drawn) + node.drop, step);
  return isMoving || ways.length > 0;
}

/** Let time pass for all that moves; whether something still does. */
function age(passed) {
  const middle = nodes.get(root);
  const before = { ...camera };
  if (middle && middle.lane !== null) {
    camera.position = eased(camera.position, middle.position, passed, 0.12);
    camera.lane = eased(camera.lane, middle.lane, passed, 0.25);
  }
  let isMoving = Math.abs(camera.position - before.position) > 0.002 || Math.abs(camera.lane - before.lane) > 0.002;
  for (const node of nodes.values()) {
    if (node.age < 1) isMoving = true;
    node.age = moves() ? Math.min(node.age + passed / GROW_S, 1) : 1;
    if (node.lane !== null) node.drawn = eased(node.drawn, node.lane, passed, 0.1);
    if (node.state === "text" && node.green > 0) {
      node.green = Math.max(node.green - passed / 2.5, 0);
      isMoving = true;
    }
  }
  for (const node of falling) {
    node.left -= passed;
    if (node.left <= 0 || !moves()) falling.delete(node);
    if (node.isRefused) node.drop += (node.speed += 420 * passed) * passed;
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
  if (!above || above.lane === null) return;
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
  const fade = node.left === undefined ? node.age : Math.max(node.left / FALL_S, 0) * 0.8;
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
    context.setLineDash(node.isRefused ? [3, 3] : []);
    context.stroke();
    context.setLineDash([]);
  }
  if (!node.label) return;
  context.globalAlpha = fade * (look.textStrength ?? 1);
  context.fillStyle = look.text;
  context.fillText(fitted(node.label, width), x, y + 0.5);
}

function appearance(node, stage, strength) {
  if (node.isRefused) return { border: colours.refused, text: colours.refused };
  if (node.left !== undefined) return { border: colours.draft, text: colours.faint };
  switch (node.state) {
    case "prompt":
      return { text: colours.faint };
    case "text": {
      const isRoot = node.id === root;
      return { fill: colours["accent-soft"], strength: 0.55 + 0.45 * node.green, text: colours.accent, border: isRoot || node.green ? colours.accent : null, borderStrength: isRoot ? 1 : node.green };
    }
    case "sent": {
      const colour = stage === undefined ? colours.head : stageColour(stage);
      const isStrong = strength > 0.5;
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
