// Ties the parts of the page together: what is fetched when, and who is told.

import { Refusal, json, path } from "./api.js";
import { CompareBox } from "./compare.js";
import { DeviceTable } from "./devices.js";
import { byId, setText } from "./dom.js";
import { RunRecord } from "./record.js";
import { Gate, Happened, RoundTable, closedSentence } from "./rounds.js";
import { RunList, RunView } from "./runs.js";
import { session } from "./session.js";
import { coalesced, follow } from "./stream.js";
import { TokenBox } from "./tokens.js";
import { VersionTable } from "./versions.js";

const REFRESH_MS = 400; // between two fetches of the same, however fast events come
const TICK_MS = 5000; // deadlines and "seen ... ago" move on
const SAY_MS = 3000; // between two announcements: a screen reader needs time to speak

const LINK = { live: "Live", waiting: "Connection lost, trying again …", resting: "Resting while hidden" };

let record = null; // of the run that is shown
let runs = [];
let signedIn = false;

/** Waits for a request; shows its problem, or says that it is done. Returns the answer, or undefined. */
async function act(promise, said) {
  try {
    const answer = await promise;
    byId("problem").hidden = true;
    if (said) say(typeof said === "function" ? said(answer) : said);
    refreshRun();
    return answer;
  } catch (error) {
    complain(error);
    return undefined;
  }
}

function complain(error) {
  if (error.name === "AbortError" || (error instanceof Refusal && error.status === 401)) return; // signing out says it
  if (!(error instanceof Refusal)) console.error(error);
  setText(byId("problem"), error.message);
  byId("problem").hidden = false;
}

let pending = [];
const speak = coalesced(() => {
  byId("news").textContent = pending.slice(-3).join(" ");
  pending = [];
}, SAY_MS);

function say(sentence) {
  pending.push(sentence);
  speak();
}

/** A refresh that can be called at any time; its problems are shown. */
function refresher(task) {
  return coalesced(async () => {
    if (!signedIn) return;
    try {
      await task();
      if (byId("problem").dataset.lost) byId("problem").hidden = true;
      delete byId("problem").dataset.lost;
    } catch (error) {
      complain(error);
      if (error instanceof Refusal && error.status === 0) byId("problem").dataset.lost = "yes";
    }
  }, REFRESH_MS);
}

const list = new RunList({ choose: (name) => choose(name, { move: true }) });
const view = new RunView({ act });
const gate = new Gate();
const roundTable = new RoundTable();
const happened = new Happened();
const versionTable = new VersionTable({ act });
const devices = new DeviceTable({ act });
const tokens = new TokenBox({ act });
const compare = new CompareBox();

function show(shown) {
  if (shown !== record) return;
  for (const id of ["run", "rounds", "versions", "compare"]) byId(id).hidden = false;
  view.show(record);
  gate.show(record);
  roundTable.show(record);
  versionTable.show(record);
  compare.show(record.run);
}

const refreshRun = refresher(async () => {
  const shown = record;
  if (shown === null) return;
  const closed = await shown.extend();
  const steps = closed.filter((row) => row.restored === null); // a roll-back has its own event
  if (shown === record) steps.slice(-3).forEach((row) => say(closedSentence(row)));
  runs = runs.map((run) => (run.run === shown.id ? shown.run : run));
  list.show(runs, record?.id);
  show(shown);
});

const refreshProgress = refresher(async () => {
  const shown = record;
  if (shown === null || shown.run.status === "finished") return;
  await shown.extendProgress();
  if (shown === record) gate.show(record);
});

const refreshRuns = refresher(async () => {
  runs = await json(path(["runs"]));
  if (record === null && runs.length) {
    const named = runs.find((run) => run.spec.name === new URLSearchParams(location.search).get("run"));
    choose((named ?? runs.find((run) => run.status === "open") ?? runs[0]).spec.name);
  }
  list.show(runs, record?.id);
});

const refreshDevices = refresher(() => devices.refresh());
const refreshTokens = refresher(() => tokens.refresh());

function choose(name, { move = false } = {}) {
  const run = runs.find((candidate) => candidate.spec.name === name);
  if (!run || run.run === record?.id) return;
  record = new RunRecord(run);
  happened.clear();
  roundTable.table.fold();
  history.replaceState(null, "", `?${new URLSearchParams({ run: name })}${location.hash}`);
  list.show(runs, record.id);
  refreshRun();
  if (move) byId("run").scrollIntoView({ block: "start" });
}

/** What an event makes stale. */
function onEvent(kind, data) {
  const mine = data.run === undefined || data.run === null || data.run === record?.id || data.run === record?.name;
  if (kind === "progress") {
    if (!mine || record === null) return undefined;
    record.progress = data;
    return gate.show(record);
  }
  if (kind === "run-created") refreshRuns();
  if (kind.startsWith("device-")) {
    refreshDevices();
    refreshTokens();
  }
  if (!mine) return kind.startsWith("run-") && refreshRuns();
  const sentence = happened.add(kind, data);
  if (sentence && kind !== "result-refused" && kind !== "device-enrolled") say(sentence); // those two may come by the hundred
  if (kind === "version-evaluated" && Number.isInteger(data.version)) record?.retake(data.version).catch(complain);
  return refreshRun();
}

function enter() {
  signedIn = true;
  refreshRuns();
  refreshDevices();
  refreshTokens();
  compare.connect().catch(complain);
  setInterval(() => {
    if (document.hidden) return;
    refreshProgress();
    refreshDevices();
  }, TICK_MS);
  follow({
    pathAfter: (last) => path(["events"], { after: last }),
    onEvent,
    onLive: () => (refreshRuns(), refreshRun(), refreshDevices()),
    onState: (state) => {
      setText(byId("link"), LINK[state]);
      byId("link").dataset.state = state;
    },
  });
}

session(enter);
