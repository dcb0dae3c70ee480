// Server-sent events read from a fetch, because EventSource cannot send the Authorization header.

import { Refusal, request } from "./api.js";

const LEAST_MS = 500;
const MOST_MS = 20000;

/** The events of a text/event-stream body as {id, kind, data}, data still text. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { id: null, kind: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data.length) yield { ...event, data: event.data.join("\n") };
          event = { id: null, kind: "message", data: [] };
          continue;
        }
        const at = line.indexOf(":");
        const field = at < 0 ? line : line.slice(0, at);
        const text = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
        if (field === "data") event.data.push(text);
        else if (field === "event") event.kind = text;
        else if (field === "id") event.id = text;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have ended already
  }
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function whenVisible() {
  while (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

/**
 * Reads events for as long as the page lives and its key is accepted: reconnects after growing, random pauses, from the last event seen, and rests while the tab is
 * hidden, because a browser has six connections to a host and a hidden tab should hold none.
 *
 * `onState` hears "live", "waiting" and "resting"; `onLive` is awaited after each connection, to fetch what was missed.
 */
export async function follow({ pathAfter, onEvent, onState, onLive }) {
  let last = null;
  let pause = LEAST_MS;
  for (;;) {
    if (document.hidden) onState("resting");
    await whenVisible();
    const connection = new AbortController();
    const hide = () => document.hidden && connection.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const response = await request(pathAfter(last), { signal: connection.signal, accept: "text/event-stream" });
      onState("live");
      await onLive();
      for await (const event of eventsOf(response.body)) {
        pause = LEAST_MS;
        if (event.id !== null) last = event.id;
        const { kind, data } = event;
        queueMicrotask(() => onEvent(kind, JSON.parse(data))); // a mistake there is reported, and does not end the stream
      }
    } catch (error) {
      if (error instanceof Refusal && error.status === 401) return;
      // Everything else is a connection that ended; the loop makes another.
    } finally {
      document.removeEventListener("visibilitychange", hide);
    }
    if (document.hidden) continue;
    onState("waiting");
    await sleep(pause * (0.5 + Math.random()));
    pause = Math.min(MOST_MS, 2 * pause);
  }
}

/** A function that runs `task` soon, never twice at once and at most once in `ms`; calls in between make one more run. */
export function coalesced(task, ms) {
  let state = "idle";
  return function call() {
    if (state !== "idle") {
      state = "again";
      return;
    }
    state = "busy";
    Promise.resolve()
      .then(task)
      .finally(() =>
        setTimeout(() => {
          const again = state === "again";
          state = "idle";
          if (again) call();
        }, ms),
      );
  };
}
