// Enrolment tokens: made here, shown once with the command that uses them, revoked here.

import { json, path } from "./api.js";
import { confirmed } from "./confirm.js";
import { byId, button, el } from "./dom.js";
import { count, date } from "./format.js";
import { Table } from "./table.js";

function field(label, attributes, hint) {
  const input = el("input", { id: `token-${attributes.name}`, "aria-describedby": `token-${attributes.name}-hint`, ...attributes });
  return el("div", { class: "field" }, el("label", { for: input.id }, label), input, el("p", { class: "hint", id: `token-${attributes.name}-hint` }, hint));
}

/** The command that makes a device of another machine. */
export function joinCommand(token, base = document.baseURI) {
  return `fwdllama join ${new URL(".", base).href.replace(/\/$/, "")} --token ${token} --model MODEL.gguf --data mine.json`;
}

const here = () => ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);

async function copy(pre, said) {
  try {
    await navigator.clipboard.writeText(pre.textContent);
    said.textContent = "Copied.";
  } catch {
    // Browsers keep the clipboard from pages that came over plain HTTP.
    getSelection().selectAllChildren(pre);
    said.textContent = "Selected; copy it with Ctrl+C (⌘C).";
  }
}

export class TokenBox {
  constructor({ act }) {
    this.act = act;
    this.made = el("div", { class: "made card", role: "status", hidden: true });
    this.form = el(
      "form",
      { class: "card", id: "token-form" },
      el("h3", {}, "Invite devices"),
      el(
        "div",
        { class: "fields" },
        field("Name", { name: "name", required: true, maxlength: 64, autocomplete: "off" }, "To tell it from others in the list."),
        field("Devices", { name: "uses", type: "number", min: 1, max: 100000, value: 1, inputmode: "numeric" }, "How many may use it; empty: any number."),
        field("Hours", { name: "hours", type: "number", min: 0.1, step: "any", value: 24, inputmode: "decimal" }, "Until it expires; empty: never."),
      ),
      el("button", { type: "submit", class: "main" }, "Make a token"),
    );
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#make();
    });
    this.table = new Table({
      caption: "Enrolment tokens",
      keyOf: (token) => token.id,
      most: 10,
      empty: "No token can be used at the moment.",
      columns: [
        { head: "Token", text: (token) => token.name },
        { head: "Uses left", kind: "number", text: (token) => (token.uses_left === null ? "any number" : count(token.uses_left)) },
        { head: "Expires", text: (token) => (token.expires_at === null ? "never" : date(token.expires_at)) },
        { head: "", sign: () => "", node: (token) => button("Revoke", () => this.#revoke(token), { "aria-label": `Revoke token ${token.name}` }) },
      ],
    });
    byId("token-box").append(this.form, this.made, this.table.element);
  }

  async refresh() {
    const now = Date.now() / 1000;
    const usable = (token) => !token.revoked_at && token.uses_left !== 0 && (token.expires_at === null || token.expires_at > now);
    this.table.show((await json(path(["tokens"]))).filter(usable));
  }

  /** Forgets the token that was shown. */
  forget() {
    this.made.hidden = true;
    this.made.replaceChildren();
  }

  async #make() {
    const given = Object.fromEntries(new FormData(this.form));
    const number = (text) => (text === "" ? null : Number(text));
    const hours = number(given.hours);
    const body = { name: given.name, uses: number(given.uses), expires_s: hours === null ? null : 3600 * hours };
    const token = await this.act(json(path(["tokens"]), { method: "POST", body }));
    if (!token) return;
    const command = el("pre", { tabindex: "0", id: "join-command", "aria-label": "Command for the device" }, joinCommand(token.token));
    const said = el("span", { class: "hint" });
    const controls = el("div", { class: "buttons" }, button("Copy", () => copy(command, said), { class: "main" }), button("Done", () => this.forget()), said);
    this.made.replaceChildren(el("h3", {}, `Run this on the device (${token.name})`), command, el("p", { class: "hint" }, `It is shown only now: the aggregator keeps no copy of a token.${here() ? " The address is that of this machine; for another one replace it by an address that it can reach." : ""}`), controls);
    this.made.hidden = false;
    this.form.reset();
    await this.act(this.refresh());
  }

  async #revoke(token) {
    if (await confirmed(`Revoke token ${token.name}?`, "No further device can enrol with it. Devices that did stay enrolled.", "Revoke")) {
      await this.act(json(path(["tokens", token.id]), { method: "DELETE" }).then(() => this.refresh()), `Token ${token.name} was revoked.`);
    }
  }
}
