// The registry of adapters: every version with its digest and score, to download or to go back to.

import { json, path, request } from "./api.js";
import { confirmed } from "./confirm.js";
import { byId, button, el, setText } from "./dom.js";
import { count, date, loss, short, size } from "./format.js";
import { Table } from "./table.js";

const SCOPE = {
  answer:
    "These adapters are of scope answer: they are on while an answer is written and off while the question is read. Use them with llama-server or with fwdllama serve-model; a program that applies them to every token gets another model.",
  all: "These adapters are of scope all: any program that loads a LoRA adapter as GGUF applies them correctly.",
};

const hex = (bytes) => Array.from(new Uint8Array(bytes), (byte) => byte.toString(16).padStart(2, "0")).join("");

/** Saves a version's adapter as a file and returns a sentence; compares the digest where the browser can compute one. */
async function download(run, version) {
  const response = await request(path(["runs", run.run, "versions", version.version, "adapter.gguf"]), { accept: "application/octet-stream" });
  const bytes = await response.arrayBuffer();
  const promised = (response.headers.get("etag") ?? "").replace(/^W\/|"/g, "");
  let checked = "";
  if (globalThis.crypto?.subtle && /^[0-9a-f]{64}$/.test(promised)) {
    const found = hex(await crypto.subtle.digest("SHA-256", bytes));
    if (found !== promised) throw new Error(`The adapter arrived damaged: its sha256 is ${found}, and should be ${promised}. It was not saved.`);
    checked = `, sha256 ${short(found)}… checked`;
  }
  const name = `${run.spec.name}-v${version.version}.gguf`;
  const url = URL.createObjectURL(new Blob([bytes], { type: "application/octet-stream" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  return `Saved ${name}: ${size(bytes.byteLength)}${checked}.`;
}

export class VersionTable {
  /** `act(promise, said)` shows the problem of a request, or says what `said` (a text, or a function of the answer) tells. */
  constructor({ act }) {
    this.act = act;
    this.record = null;
    this.table = new Table({
      caption: "Adapter versions, newest first",
      keyOf: (version) => `${this.record?.id} ${version.version}`,
      most: 8,
      empty: "No version yet.",
      columns: [
        { head: "Version", sign: (version) => this.#tags(version).join(), node: (version) => [el("span", {}, String(version.version)), ...this.#tags(version).map((tag) => el("span", { class: "tag" }, tag))] },
        { head: "Made", text: (version) => date(version.created_at) },
        { head: "Probes", kind: "number", text: (version) => count(version.n_probes) },
        { head: "Loss", kind: "number", text: (version) => loss(version.loss) },
        { head: "Held out", kind: "number", text: (version) => loss(version.held_out_loss) },
        {
          head: "Digest",
          title: (version) => digestTitle(version),
          sign: (version) => version.adapter_sha256 ?? version.theta_digest,
          node: (version) => el("code", {}, version.adapter_sha256 ? `file ${short(version.adapter_sha256)}` : `theta ${short(version.theta_digest)}`),
        },
        { head: "", sign: (version) => `${this.record.run.status} ${version.version === this.record.run.version}`, node: (version) => this.#controls(version) },
      ],
    });
    byId("version-table").append(this.table.element);
  }

  show(record) {
    if (this.record?.id !== record.id) this.table.fold();
    this.record = record;
    setText(byId("scope-note"), SCOPE[record.run.spec.train.space.scope] ?? "");
    this.table.show([...record.versions.values()].sort((a, b) => b.version - a.version));
  }

  #tags(version) {
    const tags = version.version === this.record.run.version ? ["latest"] : [];
    return version.version === this.record.best ? [...tags, "best"] : tags;
  }

  #controls(version) {
    const record = this.record;
    const { run } = record;
    const number = version.version;
    const save = async () => {
      await this.act(download(run, version), (sentence) => sentence);
      await record.retake(number).catch(() => {}); // only to show the file's digest sooner
      if (this.record === record) this.show(record);
    };
    const back = async () => {
      const text = `The next round of ${run.spec.name} starts from version ${number} again. What was learned since stays in the ledger and in the list of versions; numbers go on.`;
      if (await confirmed(`Roll back to version ${number}?`, text, "Roll back")) {
        const said = `${run.spec.name} was rolled back to version ${number}.`;
        await this.act(json(path(["runs", run.run, "rollback"]), { method: "POST", body: { version: number } }), said);
      }
    };
    const label = { "aria-label": `Download adapter of version ${number}` };
    const offers = [button("Download", save, label)];
    if (run.status !== "finished" && number !== run.version) offers.push(button("Roll back", back, { "aria-label": `Roll back to version ${number}` }));
    return el("div", { class: "buttons" }, ...offers);
  }
}

function digestTitle(version) {
  const file = version.adapter_sha256 ? `adapter.gguf sha256 ${version.adapter_sha256}\n` : "";
  return `${file}theta sha256 ${version.theta_digest}`;
}
