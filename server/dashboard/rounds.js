// The round in progress as a bar against its gate, the closed ones as a table, and what else happened.

import { byId, el, setText } from "./dom.js";
import { clock, count, counted, duration, figure, loss } from "./format.js";
import { Table } from "./table.js";

const MOST_HAPPENED = 12;

/** The live bar: probes that count, those being worked on, and the gate. */
export class Gate {
  constructor() {
    this.label = el("p", { class: "gate-label", id: "gate-label" });
    this.state = el("p", { class: "gate-state" });
    this.done = el("div", { class: "done" });
    this.leased = el("div", { class: "leased" });
    this.mark = el("div", { class: "mark" });
    this.bar = el("div", { class: "bar", role: "progressbar", "aria-labelledby": "gate-label", "aria-valuemin": "0" }, this.done, this.leased, this.mark);
    const legend = el("ul", { class: "legend" }, ...[["main", "counted"], ["quiet", "being worked on"], ["limit", "gate"]].map(([role, name]) => el("li", { class: role }, el("i"), name)));
    this.element = el("div", { class: "card gate" }, el("div", { class: "figure-head" }, this.label, legend), this.bar, this.state);
    byId("run-gate").append(this.element);
  }

  show(record) {
    const { progress, run } = record;
    this.element.hidden = !progress || run.status === "finished";
    if (this.element.hidden) return;
    const { probes, wanted, leased } = progress;
    const most = Math.max(wanted, probes + leased, 1);
    setText(this.label, `Round ${progress.version}`);
    this.done.style.width = `${(100 * probes) / most}%`;
    this.leased.style.width = `${(100 * leased) / most}%`;
    this.mark.style.left = `${(100 * wanted) / most}%`;
    this.bar.setAttribute("aria-valuemax", wanted);
    this.bar.setAttribute("aria-valuenow", Math.min(probes, wanted));
    this.bar.setAttribute("aria-valuetext", `${probes} of ${counted(wanted, "probe")}`);
    setText(this.state, sentence(progress, run));
  }
}

function sentence({ probes, wanted, leased, deadline }, run) {
  if (run.status === "paused") return "Paused: no task is given out.";
  if (wanted === 0) return "All rounds are done; the last version is being scored.";
  const left = deadline - Date.now() / 1000;
  const until = left > 0 ? `deadline in ${duration(left)}` : "deadline passed";
  return `${count(probes)} of ${counted(wanted, "probe")}, ${count(leased)} being worked on, ${until}.`;
}

/** The closed rounds, newest first. */
export class RoundTable {
  constructor() {
    this.table = new Table({
      caption: "Closed rounds, newest first",
      keyOf: (row) => row.round,
      most: 10,
      empty: "No round has closed yet; the first needs devices that work on it.",
      columns: [
        { head: "Round", text: (row) => String(row.round) },
        { head: "Closed", text: (row) => clock(row.closed_at) },
        { head: "Took", kind: "number", text: (row) => duration(row.duration_s) },
        { head: "Probes", kind: "number", text: (row) => (row.restored === null ? `${count(row.n_probes)} / ${count(row.n_wanted)}` : `back to version ${row.restored}`) },
        { head: "Devices", kind: "number", text: (row) => count(row.n_devices) },
        { head: "Loss", kind: "number", text: (row) => loss(row.loss) },
        { head: "Slope (rms)", kind: "number", text: (row) => figure(row.gradient_rms) },
        { head: "Step", kind: "number", text: (row) => figure(row.lr) },
      ],
    });
    byId("round-table").append(this.table.element);
  }

  show(record) {
    this.table.show([...record.rounds].reverse());
  }
}

/** One sentence about a round that closed. */
export function closedSentence(row) {
  return `Round ${row.round} closed: ${counted(row.n_probes, "probe")} of ${counted(row.n_devices, "device")}, loss ${loss(row.loss)}.`;
}

const SENTENCES = {
  "run-created": () => "A run was created.",
  "round-extended": (data) => `The deadline of round ${data.round} passed with too few probes; it was extended.`,
  "round-abandoned": (data) => `Round ${data.round} was abandoned${because(data.reason)}`,
  "version-evaluated": (data) => `Version ${data.version} was scored: held-out loss ${loss(data.held_out_loss)}.`,
  "run-paused": () => "The run was paused.",
  "run-resumed": () => "The run goes on.",
  "run-finished": (data) => `The run is finished${because(data.reason)}`,
  "run-rolled-back": (data) => `The run was rolled back to version ${data.to}; this is version ${data.round + 1}.`,
  "device-enrolled": (data) => `Device ${data.name} enrolled.`,
  "device-revoked": (data) => `Device ${data.device} was revoked.`,
  "result-refused": (data) => `A result of device ${data.device} was refused${because(data.why)}`,
};

const because = (reason) => `: ${reason.replace(/\.$/, "")}.`;

/** What happened besides closed rounds, newest first. */
export class Happened {
  constructor() {
    this.list = byId("happened");
  }

  /** Adds an event; returns its sentence, or null for a kind that has none. */
  add(kind, data) {
    const sentence = SENTENCES[kind]?.(data) ?? null;
    if (sentence === null) return null;
    this.list.prepend(el("li", {}, el("time", {}, clock(data.at)), " ", sentence));
    while (this.list.children.length > MOST_HAPPENED) this.list.lastChild.remove();
    return sentence;
  }

  clear() {
    this.list.replaceChildren();
  }
}
