// Requests to the aggregator with the admin key, which lives in this tab's session and nowhere else.

const STORE = "fwdllama-admin-key";

/** An answer that is no success; its message is one sentence for the reader. */
export class Refusal extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORE),
  set: (value) => sessionStorage.setItem(STORE, value),
  forget: () => sessionStorage.removeItem(STORE),
};

let refused = () => {};

/** Calls `listener` when the aggregator no longer accepts the key. */
export function onKeyRefused(listener) {
  refused = listener;
}

async function sentenceOf(response) {
  try {
    const { detail } = await response.json();
    if (typeof detail === "string") return detail;
    if (Array.isArray(detail) && detail.length) return `${(detail[0].loc ?? []).join(".")}: ${detail[0].msg}.`;
  } catch {
    // Not JSON: a proxy's answer, of which the status says enough.
  }
  return `The aggregator answered ${response.status} ${response.statusText}.`;
}

/** The response to a request. Throws Refusal for anything but success. */
export async function request(path, { method = "GET", body, signal, accept = "application/json" } = {}) {
  const secret = key.get();
  const headers = { Accept: accept };
  if (secret) headers.Authorization = `Bearer ${secret}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The aggregator cannot be reached; this page tries again by itself.");
  }
  if (response.ok) return response;
  const sentence = await sentenceOf(response);
  if (response.status === 401 && secret === key.get()) refused();
  throw new Refusal(response.status, sentence);
}

/** The JSON answer to a request; null for an empty one. */
export async function json(path, options) {
  const response = await request(path, options);
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** A path below /v1, each part escaped, with its query. */
export function path(parts, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
  const tail = given.length ? `?${new URLSearchParams(given)}` : "";
  return `v1/${parts.map((part) => encodeURIComponent(part)).join("/")}${tail}`;
}

/** Whether the aggregator takes this key. Throws Refusal where it cannot say. */
export async function accepts(candidate) {
  if (!/^[\x21-\x7e]+$/.test(candidate)) return false; // a header could not carry it
  const headers = { Authorization: `Bearer ${candidate}`, Accept: "application/json" };
  let response;
  try {
    response = await fetch(path(["tokens"]), { headers, cache: "no-store" });
  } catch {
    throw new Refusal(0, "The aggregator cannot be reached; is it running?");
  }
  if (response.ok) return true;
  if (response.status === 401 || response.status === 403) return false;
  throw new Refusal(response.status, await sentenceOf(response));
}
