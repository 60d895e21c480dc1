// What is asked of the server: with the API key where it wants one, and under a label that joins texts and events.

const KEY = "flowspec-key";
const LABEL = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

/** A request that fails; its message is for people. */
export class AskError extends Error {}

/** A response with a status of success. Where the server wants a key, the user is asked for it, again and again. */
export async function ask(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { "X-Flowspec-Label": LABEL, ...options.headers };
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.ok) return response;
    const told = await response.json().catch(() => null);
    if (response.status !== 401) throw new AskError(told?.error?.message ?? `the server answers ${response.status}`);
    await askForKey(key);
  }
}

let asking = null; // of several requests that are refused, one asks

function askForKey(refused) {
  if (sessionStorage.getItem(KEY) !== refused) return Promise.resolve(); // there is another one meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    const take = () => {
      if (!field.value.trim()) {
        dialog.showModal(); // it was closed by Escape, and nothing works without
        return;
      }
      sessionStorage.setItem(KEY, field.value.trim());
      field.value = "";
      dialog.removeEventListener("close", take);
      asking = null;
      resolve();
    };
    dialog.addEventListener("close", take);
    dialog.showModal();
  });
  return asking;
}

/** The server-sent events of a response: {kind, data} each, and {kind: "comment", data} for comments. */
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        let kind = "message";
        const data = [];
        for (const line of block.split("\n")) {
          if (line.startsWith(":")) yield { kind: "comment", data: line.slice(1).trim() };
          else if (line.startsWith("event:")) kind = line.slice(6).trim();
          else if (line.startsWith("data:")) data.push(line.slice(5).trim());
        }
        if (data.length) yield { kind, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
