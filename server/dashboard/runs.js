// The list of runs, and of the chosen one its numbers, curves, settings and controls.

import { json, path } from "./api.js";
import { Chart } from "./charts.js";
import { confirmed } from "./confirm.js";
import { byId, button, el, setText } from "./dom.js";
import { count, counted, loss } from "./format.js";
import { Table } from "./table.js";

const STATUS = { open: "open", paused: "paused", finished: "finished" };

function pill(run) {
  return el("span", { class: `pill ${run.status in STATUS ? run.status : ""}` }, run.status);
}

/** The table of all runs; choosing one calls `choose(name)`. */
export class RunList {
  constructor({ choose }) {
    this.chosen = null;
    this.table = new Table({
      caption: "Runs",
      keyOf: (run) => run.run,
      most: 10,
      empty: "There is no run yet.",
      rowClass: (run) => (run.run === this.chosen ? "chosen" : ""),
      columns: [
        {
          head: "Run",
          sign: (run) => `${run.run} ${run.run === this.chosen}`,
          node: (run) => button(run.spec.name, () => choose(run.spec.name), { class: "link-button", "aria-current": run.run === this.chosen ? "true" : null }),
        },
        { head: "Status", sign: (run) => run.status, node: pill },
        { head: "Base model", text: (run) => run.spec.base.name },
        { head: "Version", kind: "number", text: (run) => count(run.version) },
        { head: "Access", text: (run) => (run.spec.public ? "public" : "with a key") },
      ],
    });
    byId("run-list").append(this.table.element);
  }

  show(runs, chosen) {
    this.chosen = chosen;
    this.table.show(runs);
  }
}

/** Everything about the chosen run that is not a round or a version. `act(promise, said)` shows the problem of a request, or says it is done. */
export class RunView {
  constructor({ act }) {
    this.act = act;
    this.loss = new Chart({
      title: "Loss",
      x: "version",
      caption: "Nats per token, lower is better: of each round's training examples, and of the devices’ held-out examples where a version was scored.",
      series: [
        { name: "training", role: "quiet" },
        { name: "held out", role: "main", dots: true },
      ],
    });
    this.pacing = new Chart({
      title: "Pacing",
      x: "round",
      fromZero: true,
      caption: "Probes merged in each round, against those that its gate wanted.",
      series: [
        { name: "probes", role: "main" },
        { name: "wanted", role: "limit" },
      ],
    });
    byId("run-charts").append(this.loss.element, this.pacing.element);
    this.tiles = new Map();
    byId("run-tiles").append((this.list = el("dl", { class: "tiles" })));
    this.drawn = "";
    this.offered = "";
  }

  show(record) {
    const { run, rounds, progress } = record;
    setText(byId("run-title"), run.spec.name);
    setText(byId("run-about"), about(run));
    this.#offer(run);
    const best = record.best === null ? null : record.versions.get(record.best);
    const last = rounds.findLast((round) => round.restored === null);
    this.#tile("Version", count(run.version), budget(run));
    this.#tile("Training loss", loss(last?.loss), last ? `round ${last.round}` : "no round has closed");
    this.#tile("Best held-out loss", loss(best?.held_out_loss), best ? `version ${best.version}` : "none is scored yet", true);
    this.#tile("Probes", count(progress?.n_probes), `${count(progress?.n_wasted)} wasted`);
    this.#tile("Results", count(progress?.n_results), `${count(progress?.n_refused)} refused`);
    this.#draw(record);
  }

  #tile(label, value, note, strong = false) {
    if (!this.tiles.has(label)) {
      const parts = [el("span", { class: "value" }), el("dd", { class: "note" })];
      this.tiles.set(label, parts);
      this.list.append(el("div", { class: strong ? "tile strong" : "tile" }, el("dt", {}, label), el("dd", {}, parts[0]), parts[1]));
    }
    const [first, second] = this.tiles.get(label);
    setText(first, value);
    setText(second, note);
  }

  #draw(record) {
    const held = [...record.versions.values()].filter((version) => Number.isFinite(version.held_out_loss)).sort((a, b) => a.version - b.version);
    const drawn = `${record.id} ${record.rounds.length} ${held.map((version) => version.held_out_loss).join()}`;
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const steps = record.rounds.filter((round) => round.restored === null);
    this.loss.show([steps.map((round) => [round.round, round.loss]), held.map((version) => [version.version, version.held_out_loss])]);
    this.pacing.show([steps.map((round) => [round.round, round.n_probes]), steps.map((round) => [round.round, round.n_wanted])]);
    byId("run-settings").replaceChildren(settings(record.run));
  }

  #offer(run) {
    if (this.offered === `${run.run} ${run.status}`) return;
    this.offered = `${run.run} ${run.status}`;
    const post = (act, said) => this.act(json(path(["runs", run.run, act]), { method: "POST" }), said);
    const name = run.spec.name;
    const finish = async () => {
      const sure = await confirmed(`Finish ${name}?`, "Its devices are sent home and no round follows. Its versions stay. A finished run cannot be reopened.", "Finish the run");
      if (sure) await post("finish", `${name} is finished.`);
    };
    const offers = {
      open: [button("Pause", () => post("pause", `${name} is paused.`)), button("Finish", finish)],
      paused: [button("Resume", () => post("resume", `${name} goes on.`), { class: "main" }), button("Finish", finish)],
    };
    byId("run-controls").replaceChildren(pill(run), ...(offers[run.status] ?? []));
  }
}

function about(run) {
  const { space, pacing } = run.spec.train;
  const pace = pacing.kind === "fixed" ? `${counted(run.spec.round.probes, "probe")} a round` : `${run.spec.round.probes} to ${run.spec.round.most} probes a round, by variance`;
  const text = `${run.spec.base.name}, ${counted(run.spec.n_params, "parameter")} of rank ${space.rank}; ${pace}; merged by ${run.spec.aggregation.rule}.`;
  return run.reason ? `${text} ${run.status[0].toUpperCase()}${run.status.slice(1)}: ${run.reason}` : text;
}

function budget(run) {
  const { steps, probes } = run.spec.train.budget;
  if (steps) return `of ${counted(steps, "round")}`;
  return probes ? `until ${counted(probes, "probe")}` : "";
}

/** Nested values as one table of dotted names. */
function settings(run) {
  const flat = (value, name) =>
    value !== null && typeof value === "object" && !Array.isArray(value)
      ? Object.entries(value).flatMap(([key, inner]) => flat(inner, name ? `${name}.${key}` : key))
      : [[name, Array.isArray(value) ? value.join(", ") : String(value ?? "–")]];
  const rows = flat(run.spec, "").map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "mono" }, value)));
  return el("table", { class: "plain" }, el("caption", { class: "unseen" }, "Settings"), el("tbody", {}, ...rows));
}
