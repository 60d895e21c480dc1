// The dialogue: messages are sent, answers streamed, stopped, written anew and edited.

import { element, showMarkdown } from "/page/markdown.js";
import { AskError, ask, readEvents } from "/page/server.js";

const KEPT = "flowspec-chat"; // for this tab, and gone with it
const STARTS = ["Explain a draft tree to a child", "Write a Python function that reverses a list", "Tell a short story"];
const byId = (id) => document.getElementById(id);
const list = byId("messages");
const composer = byId("composer");
const field = byId("message");
const settings = ["system", "temperature", "seed", "most"].map(byId);

let follows = true; // whether the end of the dialogue is what is looked at
let messages = []; // {role, content, thought, note, isFailed}
let writing = null; // the AbortController of the answer that is written

export function startChat() {
  restore();
  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    say(field.value);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      say(field.value);
    }
  });
  field.addEventListener("input", fitField);
  byId("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && writing && stop());
  byId("clear").addEventListener("click", () => {
    stop();
    messages = [];
    show();
    field.focus();
  });
  for (const setting of settings) setting.addEventListener("change", keep);
  list.addEventListener("scroll", () => (follows = list.scrollHeight - list.scrollTop - list.clientHeight < 60));
  new ResizeObserver(follow).observe(list);
  show();
  follow();
}

function follow() {
  if (follows) list.scrollTop = list.scrollHeight;
}

function fitField() {
  field.rows = Math.min(field.value.split("\n").length, 8);
}

function say(text) {
  if (!text.trim() || writing) return;
  field.value = "";
  fitField();
  messages.push({ role: "user", content: text });
  answer();
}

function stop() {
  writing?.abort();
}

async function answer() {
  const [system, temperature, seed, most] = settings.map((setting) => setting.value.trim());
  const said = messages.filter((message) => !message.isFailed).map(({ role, content }) => ({ role, content }));
  const body = { stream: true, messages: said }; // of the one model that is served
  if (system) body.messages.unshift({ role: "system", content: system });
  if (temperature) body.temperature = Number(temperature);
  if (seed) body.seed = Number(seed);
  if (most) body.max_tokens = Number(most);
  const reply = { role: "assistant", content: "", thought: "", note: "", isFailed: false };
  const own = (writing = new AbortController());
  messages.push(reply);
  show();
  follows = true;
  follow();
  const view = viewOf(reply);
  setWriting(view, true);
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await ask("/v1/chat/completions", {
      method: "POST",
      headers,
      body: JSON.stringify(body),
      signal: own.signal,
    });
    for await (const { kind, data } of readEvents(response)) {
      if (kind === "comment") reply.note = data;
      else if (data !== "[DONE]") take(reply, JSON.parse(data));
      grow(view, reply);
    }
  } catch (error) {
    if (own.signal.aborted) reply.note = "stopped";
    else {
      reply.isFailed = true;
      reply.note = error instanceof AskError ? error.message : "the connection to the server was lost";
    }
  }
  writing = null;
  grow(view, reply);
  setWriting(view, false);
  keep();
}

function take(reply, event) {
  if (event.error) throw new AskError(event.error.message);
  const choice = event.choices[0];
  reply.content += choice?.delta?.content ?? "";
  reply.thought += choice?.delta?.reasoning_content ?? "";
  reply.note = "";
  if (event.flowspec) reply.note = describe(event.flowspec);
}

function describe({ completion_tokens: tokens, tokens_per_s: rate, acceptance_length: length, seed }) {
  return `${tokens} tokens, ${rate} tokens/s, ${length} per verification, seed ${seed}`;
}

// ---------------------------------------------------------------- what is seen

const views = new WeakMap(); // of messages, which keep theirs, so that only what is new is read out

function viewOf(message) {
  if (!views.has(message)) views.set(message, makeMessage(message));
  return views.get(message);
}

function show() {
  const shown = messages.length ? messages.map(viewOf) : [makeWelcome()];
  for (const child of [...list.children]) if (!shown.includes(child)) child.remove();
  for (const view of shown) if (!view.parentNode) list.append(view);
  keep();
}

function setWriting(view, isWriting) {
  if (!isWriting && document.activeElement === byId("stop")) field.focus();
  byId("send").hidden = isWriting;
  byId("stop").hidden = !isWriting;
  list.classList.toggle("writing", isWriting);
  view.classList.toggle("waiting", isWriting);
  view.setAttribute("aria-busy", String(isWriting));
}

/** Show what has come of an answer; who has scrolled up stays there. */
function grow(view, reply) {
  fill(view, reply);
  follow();
}

function fill(view, { content, thought, note, isFailed }) {
  view.classList.toggle("failed", isFailed);
  view.querySelector(".thought").textContent = thought;
  showMarkdown(view.querySelector(".said"), content);
  view.querySelector(".what").textContent = note;
}

function makeMessage(message) {
  const said = element("div");
  said.className = "said";
  const tools = element("div");
  tools.className = "tools";
  const view = element("article", said, tools);
  view.className = `message ${message.role}`;
  view.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  if (message.role === "user") {
    said.textContent = message.content;
    tools.append(makeButton("Edit", () => edit(view, message)));
    return view;
  }
  const thought = element("div");
  thought.className = "thought";
  const note = element("span");
  note.className = "what";
  view.prepend(thought);
  view.setAttribute("aria-live", "polite"); // and busy while it is written, so that it is read out once, whole
  tools.append(note);
  tools.append(makeButton("Copy", (button) => copy(message.content, button)));
  tools.append(makeButton("Regenerate", () => answerFrom(message)));
  fill(view, message);
  return view;
}

function makeWelcome() {
  const title = element("strong", "One model, many small boards");
  const starts = element("div", ...STARTS.map((text) => makeButton(text, () => say(text))));
  starts.className = "starts";
  const text = "Ask something, and watch the draft tree flow around the ring: green is what the model took.";
  const view = element("div", title, text, starts);
  view.className = "welcome";
  return view;
}

export function makeButton(text, onClick) {
  const button = element("button", text);
  button.type = "button";
  button.addEventListener("click", () => onClick(button));
  return button;
}

/** Put a text into the clipboard, and say so on the button; over plain HTTP browsers let no page do it. */
export async function copy(text, button) {
  const name = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed by the browser";
  }
  setTimeout(() => (button.textContent = name), 2000);
}

/** Forget a message and all behind it; what is given instead comes in its place, and is answered. */
function answerFrom(message, ...instead) {
  messages.splice(messages.indexOf(message), Infinity, ...instead);
  answer();
}

function edit(view, message) {
  const before = [...view.childNodes];
  const box = element("textarea");
  box.value = message.content;
  box.rows = Math.min(box.value.split("\n").length + 1, 12);
  box.setAttribute("aria-label", "Message to edit");
  const form = element("form", box, makeButton("Cancel", () => view.replaceChildren(...before)));
  const send = element("button", "Send");
  form.append(send);
  form.className = "edit";
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!box.value.trim() || writing) return;
    answerFrom(message, { role: "user", content: box.value });
    field.focus();
  });
  view.replaceChildren(form);
  box.focus();
}

// ---------------------------------------------------------------------- kept

function keep() {
  const values = settings.map((setting) => setting.value);
  try {
    sessionStorage.setItem(KEPT, JSON.stringify({ messages, values }));
  } catch {
    // a dialogue that is too long for the browser is not kept
  }
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
    messages = kept.messages ?? [];
    settings.forEach((setting, at) => (setting.value = kept.values?.[at] ?? setting.value));
  } catch {
    messages = [];
  }
}
