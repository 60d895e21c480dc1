// Who worked on which chunk in the last moments: a lane for the origin and one for each stage. Filled bars are as the
// chunks have told when they came back, outlined ones are expected; all slide to the left.

import { clearCanvas, colours, eased, onFrame, shownTime, stageColour, wake } from "/page/motion.js";

const BAR = 18; // pixels of a bar of mean length
const SHORTEST_S = 0.25;
const LONGEST_S = 20;
const MOST_BARS = 1500;
const FUTURE = 0.12; // of the width, behind the line that is now
const STAYS_S = 0.5; // after the last chunk the picture stands still

let names = ["origin"];
let bars = []; // {lane, began, ended, rows, kind}
let expected = [];
let window_s = 3;
let heard = -Infinity;
let canvas = null;

export function startLanes() {
  canvas = document.getElementById("lanes-canvas");
  onFrame(draw);
}

/** There are these stages, in their order. */
export function nameLanes(nodes) {
  const isSame = nodes.length === names.length - 1 && nodes.every((node, at) => names[at + 1] === node);
  if (isSame) return;
  names = ["origin", ...nodes];
  bars = [];
  canvas.style.height = `${Math.max(names.length * 24 + 8, 80)}px`;
  wake();
}

export function showLanes({ texts, trips, jobs }) {
  for (const [, , , spans, sizes] of trips)
    spans.forEach(([began, ended], at) => bars.push({ lane: at + 1, began, ended, rows: sizes[at], kind: "stage" }));
  for (const [, kind, [began, ended]] of jobs) bars.push({ lane: 0, began, ended, rows: 0, kind });
  expected = texts.flatMap(({ ways }) =>
    ways.flatMap(([rows, , begins, ends]) =>
      begins.map((began, at) => ({ lane: at + 1, began, ended: ends[at], rows: rows.length })),
    ),
  );
  if (bars.length > MOST_BARS) bars = bars.slice(-MOST_BARS);
  heard = shownTime();
  wake();
}

function draw(passed) {
  const now = Math.min(shownTime(), heard + STAYS_S);
  const isMoving = now < heard + STAYS_S;
  const view = clearCanvas(canvas);
  const left = view ? Math.min(view.width * 0.24, 110) : 0;
  const lengths = bars.filter((bar) => bar.kind === "stage").slice(-60).map((bar) => bar.ended - bar.began);
  if (view && lengths.length) {
    const mean = lengths.reduce((sum, one) => sum + one, 0) / lengths.length;
    window_s = eased(window_s, Math.min(Math.max((mean * (view.width - left)) / BAR, SHORTEST_S), LONGEST_S), passed, 1.5);
  }
  bars = bars.filter((bar) => bar.ended > now - LONGEST_S);
  if (!view || names.length === 1) return isMoving;
  const { context, width, height } = view;
  const lane = (height - 8) / names.length;
  const line = left + (width - left) * (1 - FUTURE);
  const scale = (line - left) / window_s;
  const x = (time) => line + (time - now) * scale;
  context.font = "12px system-ui, sans-serif";
  context.textBaseline = "middle";
  names.forEach((name, at) => {
    const y = 4 + at * lane;
    context.globalAlpha = 1;
    context.fillStyle = colours.line;
    context.fillRect(left, y + lane - 1, width - left, 1);
    context.fillStyle = at ? stageColour(at - 1) : colours.ink;
    context.textAlign = "left";
    context.fillText(name, 0, y + lane / 2, left - 8);
  });
  context.save();
  context.beginPath();
  context.rect(left, 0, width - left, height);
  context.clip();
  for (const bar of bars) drawBar(context, bar, x, lane, true);
  for (const bar of expected) if (bar.ended > now - window_s * 0.2) drawBar(context, bar, x, lane, false);
  context.globalAlpha = 0.6;
  context.fillStyle = colours.faint;
  context.fillRect(line, 0, 1, height);
  context.restore();
  return isMoving;
}

function drawBar(context, { lane: at, began, ended, rows, kind }, x, lane, isKnown) {
  const from = x(began);
  const width = Math.max(x(ended) - from - 1, 1);
  const y = 4 + at * lane + 3;
  const height = lane - 7;
  const colour = at ? stageColour(at - 1) : kind === "head" ? colours.head : colours.pass;
  context.beginPath();
  context.roundRect(from, y, width, height, Math.min(4, width / 2));
  if (!isKnown) {
    context.globalAlpha = 0.75;
    context.strokeStyle = colour;
    context.lineWidth = 1;
    context.stroke();
    return;
  }
  context.globalAlpha = at ? 0.88 : 1;
  context.fillStyle = colour;
  context.fill();
  if (!rows || width < 15) return;
  context.globalAlpha = 1;
  context.fillStyle = colours.sheet;
  context.textAlign = "center";
  context.fillText(String(rows), from + width / 2, y + height / 2 + 0.5, width - 2);
}
