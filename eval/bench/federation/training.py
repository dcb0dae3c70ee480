"""Federated training against training alone: the same probes, the questions of one shard a device, scores on questions of neither.

Everything is done by the commands that a user gives: `serve`, `run create`, four times `join`, `run verify`, `run export`, `eval`.
"""

from __future__ import annotations

import gzip
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..child import Command, run
from ..measure import Bar, Bench, BenchError, Item, Measured
from ..runs import scores, train_words

N_DEVICES = 4
ROUNDS = 24
PROBES_PER_ROUND = 80
RUN = "bench"
PATIENCE_S = 1800.0
POLL_S = 1.0


def shards(bench: Bench, folder: Path) -> list[Path]:
    """The training questions by article, an equal number of articles for each device: no two share a subject."""
    with gzip.open(bench.train_data, "rt") as file:
        whole = json.load(file)
    articles, paths = whole["data"], []
    for i in range(N_DEVICES):
        paths.append(folder / f"shard-{i}.json")
        part = articles[i * len(articles) // N_DEVICES : (i + 1) * len(articles) // N_DEVICES]
        paths[-1].write_text(json.dumps({**whole, "data": part}))
    return paths


def federated(bench: Bench, folder: Path, rounds: int) -> tuple[Path, dict[str, Any], str]:
    """The last version's adapter, what the run came to, and the command that made the run."""
    with ExitStack() as processes:
        serving = processes.enter_context(Command(bench, "serve", folder / "aggregator", "--port", 0, "--json"))
        served = _first_line(serving)
        here = ("--url", served["url"], "--key-file", served["key_file"])
        words = ("run", "create", RUN, "--model", bench.model, "--data", bench.train_data, "--rounds", rounds, *here, "--json")
        made = run(bench, *words)
        for i, shard in enumerate(shards(bench, folder)):
            place = ("--folder", folder / f"device-{i}", "--name", f"device-{i}", "--min-battery", 0, "--threads", 1, "--json")
            join = ("join", served["url"], "--token", served["token"], "--model", bench.model, "--data", shard, *place)
            processes.enter_context(Command(bench, *join))
        began = time.monotonic()
        while (about := run(bench, "run", "show", RUN, *here, "--json").json)["status"] != "finished":
            if time.monotonic() - began > PATIENCE_S:
                raise BenchError(f"after {PATIENCE_S:.0f} s the run is at version {about['version']} of {rounds}.")
            time.sleep(POLL_S)
        wall_s = time.monotonic() - began
        verified = run(bench, "run", "verify", RUN, *here, "--json").json
        adapter = folder / "federated.gguf"
        exported = run(bench, "run", "export", RUN, "--version", "latest", "--out", adapter, *here, "--json").json
    identical = verified["adapter_sha256"] == exported["sha256"] and verified["version"] == exported["version"]
    facts = {"wall_s": wall_s, "identical": identical, "n_wasted": about["progress"]["n_wasted"], "probes": about["progress"]["n_probes"]}
    return adapter, facts, made.command


def _first_line(serving: Command) -> dict[str, Any]:
    """What `serve --json` says once it listens."""
    for _ in range(600):
        text = serving.said()
        if "\n" in text:
            found: dict[str, Any] = json.loads(text)
            return found
        if serving.process.poll() is not None:
            break
        time.sleep(0.1)
    raise BenchError("`fwdllama serve` did not start; commands.log in the work folder says why.")


def equal(bench: Bench) -> Measured:
    """Train both ways, then score both."""
    folder = bench.fresh("federation-training")
    rounds = max(1, round(ROUNDS * min(1.0, bench.scale)))
    adapter, facts, command = federated(bench, folder, rounds)
    alone = folder / "alone"
    alone.mkdir()
    single = run(bench, *train_words(bench, alone, "--probes", facts["probes"])).json
    together, by_itself = scores(bench, bench.model, adapter), scores(bench, bench.model, alone / "adapter.gguf")
    figures = {
        "loss_ratio": together["loss"] / by_itself["loss"],
        "identical": facts["identical"],
        "loss": together["loss"],
        "loss_alone": by_itself["loss"],
        "f1": together["f1"],
        "f1_alone": by_itself["f1"],
        "probes": facts["probes"],
        "probes_alone": single["probes"],
        "n_wasted": facts["n_wasted"],
        "wall_s": facts["wall_s"],
        "wall_s_alone": single["elapsed_s"],
    }
    return Measured(figures, command)


ITEM = Item(
    "federation-training",
    "four devices with different articles against training alone with as many probes: loss on 400 questions of the dev sample",
    (Bar("loss_ratio", "<=", 1.02), Bar("identical", "is", True)),
    ("loss_ratio", "identical", "loss", "loss_alone", "f1", "f1_alone", "probes", "n_wasted"),
    ("data", "server"),
    14,
    equal,
)
