// What is known of the run that is shown: the run, its closed rounds, its versions and the round in progress.

import { json, path } from "./api.js";

const PAGE = 500;
const AGAIN = 8; // versions at the end that are asked for again, because held-out losses arrive after a version does

export class RunRecord {
  constructor(run) {
    this.id = run.run;
    this.run = run;
    this.rounds = [];
    this.versions = new Map(); // by number
    this.progress = null;
    this.loaded = false;
  }

  get name() {
    return this.run.spec.name;
  }

  /** The number of the best version, null while none is scored. */
  get best() {
    return this.progress?.best_version ?? null;
  }

  /** Fetches what is new. Returns the rounds that closed since the last time; the first time, none. */
  async extend() {
    this.run = await json(path(["runs", this.id]));
    const closed = await this.#pages("rounds", this.rounds.length ? this.rounds.at(-1).round + 1 : 0, (row) => row.round);
    this.rounds.push(...closed);
    const newest = Math.max(0, ...this.versions.keys());
    await this.#takeVersions(Math.max(0, newest - AGAIN));
    await this.extendProgress();
    if (this.best !== null) await this.retake(this.best);
    const news = this.loaded ? closed : [];
    this.loaded = true;
    return news;
  }

  /** Fetches the state of the round in progress. */
  async extendProgress() {
    this.progress = await json(path(["runs", this.id, "progress"]));
  }

  /** Fetches one version again, of which something is news. */
  async retake(number) {
    this.versions.set(number, await json(path(["runs", this.id, "versions", number])));
  }

  async #takeVersions(from) {
    for (const version of await this.#pages("versions", from, (row) => row.version)) this.versions.set(version.version, version);
  }

  async #pages(kind, from, numberOf) {
    const found = [];
    for (let next = from; ; ) {
      const page = await json(path(["runs", this.id, kind], { from: next, limit: PAGE }));
      found.push(...page);
      if (page.length < PAGE) return found;
      next = numberOf(page.at(-1)) + 1;
    }
  }
}
