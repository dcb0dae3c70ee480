// Signing in and out. The key is taken from the form, or from `#key=...`, which leaves the address bar before anything else happens.

import { accepts, key, onKeyRefused } from "./api.js";
import { byId, setText } from "./dom.js";

const WRONG = "This is not the admin key of this aggregator.";

const FAREWELL = "fwdllama-farewell"; // what the login box says after a reload

function keyOfAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = given.get("key");
  if (found === null) return null;
  given.delete("key");
  const rest = given.toString();
  history.replaceState(null, "", location.pathname + location.search + (rest ? `#${rest}` : ""));
  return found;
}

function shown(signedIn) {
  byId("login").hidden = signedIn;
  for (const id of ["app", "sections", "leave", "link"]) byId(id).hidden = !signedIn;
}

/** Runs `enter()` when somebody signs in. Signing out, or a key that is refused, loads the page anew: nothing that it showed stays. */
export async function session(enter) {
  const input = byId("key");
  let inside = false;

  function go(sentence) {
    key.forget();
    if (inside) {
      sessionStorage.setItem(FAREWELL, sentence);
      location.reload();
      return;
    }
    shown(false);
    input.value = "";
    setText(byId("login-problem"), sentence);
    input.focus();
  }

  async function come(candidate, { quiet = false } = {}) {
    try {
      if (!(await accepts(candidate))) return go(WRONG);
    } catch (error) {
      return go(error.message);
    }
    key.set(candidate);
    input.value = "";
    setText(byId("login-problem"), "");
    shown(true);
    inside = true;
    if (!quiet) byId("runs-title").focus();
    return enter();
  }

  byId("login").addEventListener("submit", (event) => {
    event.preventDefault();
    come(input.value.trim());
  });
  byId("leave").addEventListener("click", () => go(""));
  onKeyRefused(() => inside && go("The aggregator no longer accepts this key. Sign in again."));

  const farewell = sessionStorage.getItem(FAREWELL) ?? "";
  sessionStorage.removeItem(FAREWELL);
  const told = keyOfAddress();
  window.addEventListener("hashchange", () => {
    const later = keyOfAddress();
    if (later !== null && !inside) come(later);
  });
  const candidate = told ?? key.get();
  if (candidate === null) return go(farewell);
  return come(candidate, { quiet: true });
}
