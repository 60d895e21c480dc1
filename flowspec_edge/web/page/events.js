// The stream of what the ring does. It is read while the page is seen, so that a hidden page costs the server nothing.

import { ask, readEvents } from "/page/server.js";

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 10000;

/** Call on[kind](data) for each event, and on.lost(reason) whenever the stream ends, for as long as the page is open. */
export async function followEvents(on) {
  let wait = FIRST_WAIT_MS;
  for (;;) {
    if (document.hidden) await nextVisibility();
    const hiding = new AbortController();
    const hide = () => document.hidden && hiding.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const response = await ask("/events", { signal: hiding.signal });
      for await (const { kind, data } of readEvents(response)) {
        wait = FIRST_WAIT_MS;
        on[kind]?.(JSON.parse(data));
      }
      on.lost("the server has ended the stream");
    } catch (error) {
      if (hiding.signal.aborted) continue;
      on.lost(error instanceof TypeError ? "the server does not answer" : error.message);
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

function nextVisibility() {
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}
