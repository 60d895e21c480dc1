// One animation loop for all pictures, the colours of the page's style, and the server's clock.

const LEAST_MS = matchMedia("(pointer: coarse)").matches ? 30 : 15; // between two frames: 30 a second spare a phone
const LATE_S = 0.15; // pictures are drawn as of so long ago, when all that moves in them is known
const OTHER_S = 5; // by which another server's clock differs, or that of one that was started again
const DRIFT_S = 0.0002; // by which the estimate of the clocks' difference may grow at each event

const reduced = matchMedia("(prefers-reduced-motion: reduce)");
/** Whether things may move by themselves. */
export const moves = () => !reduced.matches;

// ------------------------------------------------------------------- colours

const NAMES = ["sheet", "ink", "faint", "line", "accent", "accent-soft", "on-accent", "refused", "draft", "head", "pass"];
const NUM_STAGES = 8;
/** The colours of the style as it is now, by name; `stages` has one for each stage. */
export const colours = { stages: [] };

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of NAMES) colours[name] = style.getPropertyValue(`--${name}`).trim();
  colours.stages = Array.from({ length: NUM_STAGES }, (_, at) => style.getPropertyValue(`--stage-${at}`).trim());
  wake();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);

export const stageColour = (number) => colours.stages[number % NUM_STAGES];
/** The same for what follows the style by itself. */
export const stageVariable = (number) => `var(--stage-${number % NUM_STAGES})`;

// --------------------------------------------------------------------- clock

let difference = Infinity; // between the page's clock and the server's, in seconds; the least is the truest

export function heardAt(now) {
  const found = performance.now() / 1000 - now;
  const isOther = Math.abs(found - difference) > OTHER_S;
  difference = isOther ? found : Math.min(difference + DRIFT_S, found);
}

/** The time on the server's clock as of which pictures are drawn. */
export const shownTime = () => performance.now() / 1000 - difference - LATE_S;

// ---------------------------------------------------------------------- loop

const draws = []; // each draws a frame, and says whether the next one would look different
let isRunning = false;
let drawnAt = 0;

export function onFrame(draw) {
  draws.push(draw);
  wake();
}

/** Have a frame drawn, and further ones as long as something moves. */
export function wake() {
  if (isRunning || !draws.length) return;
  isRunning = true;
  requestAnimationFrame(step);
}

function step(time) {
  if (time - drawnAt < LEAST_MS) {
    requestAnimationFrame(step);
    return;
  }
  const passed = Math.min((time - drawnAt) / 1000, 0.1);
  drawnAt = time;
  isRunning = draws.map((draw) => draw(passed)).some(Boolean);
  if (isRunning) requestAnimationFrame(step);
}

/** A canvas's context, cleared, with its size in CSS pixels; null where it is not shown. */
export function clearCanvas(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return null;
  const scale = Math.min(devicePixelRatio || 1, 2);
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** What a value that is drawn toward another one is after some seconds; at once where nothing may move. */
export const eased = (value, goal, passed, seconds = 0.15) =>
  moves() ? goal + (value - goal) * Math.exp(-passed / seconds) : goal;

readColours();
new ResizeObserver(wake).observe(document.body);
