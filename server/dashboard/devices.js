// The devices, a page at a time: there may be ten thousand of them.

import { json, path } from "./api.js";
import { confirmed } from "./confirm.js";
import { byId, button, el, setText } from "./dom.js";
import { ago, count, date, percent, size } from "./format.js";
import { Table } from "./table.js";

const PAGE = matchMedia("(max-width: 700px)").matches ? 10 : 25; // cards are long

function power(device) {
  if (device.battery === null && device.charging === null) return "–";
  return [device.battery === null ? null : percent(device.battery), device.charging ? "charging" : null].filter((part) => part).join(", ") || "on battery";
}

export class DeviceTable {
  constructor({ act }) {
    this.act = act;
    this.before = []; // where the earlier pages begin
    this.after = null; // where this one does: after this device
    this.page = [];
    this.table = new Table({
      caption: "Devices",
      keyOf: (device) => device.device,
      empty: "No device has enrolled yet. Make a token below and run its command on a device.",
      rowClass: (device) => (device.revoked_at ? "revoked" : ""),
      columns: [
        { head: "Device", text: (device) => device.name, title: (device) => `${device.device}, enrolled ${date(device.enrolled_at)}` },
        { head: "Last seen", kind: "still", text: (device) => ago(device.last_seen), title: (device) => date(device.last_seen) },
        { head: "Power", text: power },
        { head: "Free memory", kind: "number", text: (device) => size(device.memory_bytes) },
        { head: "Probes", kind: "number", sign: (device) => `${device.n_probes} ${this.most}`, node: (device) => this.#contribution(device) },
        { head: "Results", kind: "number", text: (device) => count(device.n_results) },
        { head: "Refused", kind: "number", text: (device) => count(device.n_refused) },
        { head: "Wasted", kind: "number", text: (device) => count(device.n_wasted) },
        { head: "", sign: (device) => Boolean(device.revoked_at), node: (device) => this.#controls(device) },
      ],
    });
    this.where = el("p", { class: "where", role: "status" });
    this.back = button("Previous", () => this.#turn(-1));
    this.on = button("Next", () => this.#turn(1));
    this.pager = el("nav", { class: "pager", "aria-label": "Pages of devices" }, this.back, this.where, this.on);
    byId("device-table").append(this.table.element, this.pager);
  }

  /** Fetches this page again. */
  async refresh() {
    const { after } = this;
    const found = await json(path(["devices"], { limit: PAGE + 1, after }));
    if (after !== this.after) return; // the page was turned meanwhile
    this.further = found.length > PAGE;
    this.page = found.slice(0, PAGE);
    this.most = Math.max(1, ...this.page.map((device) => device.n_probes));
    this.table.show(this.page);
    const first = this.before.length * PAGE;
    setText(this.where, this.page.length ? `Devices ${count(first + 1)} to ${count(first + this.page.length)}` : "");
    this.pager.hidden = !this.before.length && !this.further;
    this.back.disabled = !this.before.length;
    this.on.disabled = !this.further;
  }

  async #turn(by) {
    if (by > 0) {
      this.before.push(this.after);
      this.after = this.page.at(-1).device;
    } else {
      this.after = this.before.pop() ?? null;
    }
    await this.act(this.refresh());
    this.table.box.scrollIntoView({ block: "nearest" });
    // The button that was pressed enables itself again when this ends, so the last page's says it afterwards.
    queueMicrotask(() => setTimeout(() => ((this.back.disabled = !this.before.length), (this.on.disabled = !this.further))));
  }

  #contribution(device) {
    const share = el("span", { class: "share", "aria-hidden": "true" });
    share.style.setProperty("--share", String(device.n_probes / this.most));
    return [share, el("span", {}, count(device.n_probes))];
  }

  #controls(device) {
    if (device.revoked_at) return [el("span", { class: "pill" }, "revoked")];
    const revoke = async () => {
      const text = `${device.name} (${device.device}) is refused from its next request on. Its accepted results stay. To come back it must enrol again.`;
      if (await confirmed("Revoke this device?", text, "Revoke")) {
        await this.act(json(path(["devices", device.device]), { method: "DELETE" }).then(() => this.refresh()), `${device.name} was revoked.`);
      }
    };
    return [button("Revoke", revoke, { "aria-label": `Revoke ${device.name}` })];
  }
}
