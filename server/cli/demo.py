"""`fwdllama demo`: an aggregator and two devices with different data on this machine, and what they learn together.

Everything that it does are commands that a user could give; it starts them, watches, and scores what comes out.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fwdllama.cli import options as o
from fwdllama.errors import RunError

from . import administrator as a
from .troupe import Player, Troupe
from .watch import Watch

MODEL = "smollm2-135m"
RUN = "demo"
ROUNDS = 32
SECONDS = 240.0  # leaves two of the six minutes to set-up and to answering
N_SHOWN = 5
N_DEVICES = 2
POLL_S = 0.3
AGGREGATOR, ADAPTER, REPORT = "aggregator", "adapter.gguf", "report.html"


def register(app: typer.Typer) -> None:
    """Add `demo`."""

    @app.command("demo", cls=o.Command)
    def demo_command(
        folder: Annotated[
            Path, typer.Option(help="Where its files go; an earlier demo there is replaced.", metavar="FOLDER")
        ] = Path("demo-run"),
        model: Annotated[str, typer.Option(help="Another model, by name or path.", metavar="MODEL")] = MODEL,
        rounds: Annotated[int, typer.Option(min=1, help="Rounds of 80 probes.", metavar="N")] = ROUNDS,
        seconds: Annotated[float, typer.Option(min=1, help="Seconds after which training ends in any case.", metavar="S")] = SECONDS,
        eval_limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N held-out questions.", metavar="N")] = None,
        threads: Annotated[int, typer.Option(min=1, help="Threads of each device.", metavar="N")] = 1,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    ) -> None:
        """Let an aggregator and two devices, which have questions about different things, fine-tune a small model together.

        Takes less than six minutes on two cores, shows a dashboard meanwhile, and what the model answered before and after.
        Needs the model: `fwdllama model fetch smollm2-135m`.
        """
        from fwdllama.cli.demo import fresh_folder
        from fwdllama.models import resolve

        resolve(model)  # before an earlier demo is replaced
        own = {AGGREGATOR, ADAPTER, REPORT, *(f"device-{i}{end}" for i in range(N_DEVICES) for end in ("", ".json", ".log"))}
        fresh_folder(folder, frozenset({*own, f"{AGGREGATOR}.log", "create.log"}))
        stage = Stage(folder, model, rounds, seconds, threads)
        with Troupe() as troupe:
            played = play(stage, troupe)
        conclude(stage, played, eval_limit, as_json=as_json)


@dataclass(frozen=True)
class Stage:
    """What was asked for."""

    folder: Path
    model: str
    rounds: int
    seconds: float
    threads: int


@dataclass(frozen=True)
class Played:
    """What came out: the run, its closed rounds and versions, the adapter's version, and what training took."""

    run: dict[str, Any]
    rounds: list[dict[str, Any]]
    versions: list[dict[str, Any]]
    version: int
    n_wasted: int
    elapsed_s: float


def play(stage: Stage, troupe: Troupe) -> Played:
    """Start everybody, watch until the run is over, and fetch the adapter.

    Raises:
        RunError: a process ended before its time, or the adapter is not the replay of the ledger.
    """
    from .replay import replayed

    folder = stage.folder
    served = json.loads(troupe.play(folder / f"{AGGREGATOR}.log", "serve", folder / AGGREGATOR, "--port", 0, "--json").line())
    url, key_file = served["url"], Path(served["key_file"])
    here = ("--url", url, "--key-file", key_file)
    shards = shared_out(folder)
    with Watch(stage.rounds) as watch, a.administrator(url, key_file) as admin:
        watch.event(f"aggregator  {url}/#key={a.admin_key(key_file)}  (the dashboard; open it while this goes on)")
        watch.event("choosing where to train and how far apart to probe")
        creation = troupe.play(
            folder / "create.log", "run", "create", RUN, "--model", stage.model, "--rounds", stage.rounds, "--evaluators", N_DEVICES, *here, "--json"
        )
        creation.process.wait()
        if creation.process.returncode:
            raise creation.failure()
        devices = [_device(stage, troupe, i, shard, served) for i, shard in enumerate(shards)]
        watch.event(f"{N_DEVICES} devices joined, each with 200 questions about eight things that the other knows nothing of")
        began = _watched(stage, admin, watch, devices)
        elapsed = time.monotonic() - began
        run = admin.ask("GET", f"/v1/runs/{RUN}")
        progress = admin.ask("GET", f"/v1/runs/{RUN}/progress")
        # Without a last score the newest version is the better guess.
        scored_last = progress["best_version"] is not None and run["reason"] == "the budget is used up"
        version = progress["best_version"] if scored_last else run["version"]
        headers = admin.download(f"/v1/runs/{RUN}/versions/{version}/adapter.gguf", folder / ADAPTER)
        again = replayed(admin, RUN, version)
        if headers["etag"].strip('"') != again.adapter_sha256:
            raise RunError(f"{folder / ADAPTER}: the adapter that was served is not the replay of the ledger.")
        watch.event(f"the adapter is the replay of {again.n_entries} ledger entries, {again.n_probes:,} probes, bit for bit")
        rounds, versions = admin.ask("GET", f"/v1/runs/{RUN}/rounds"), admin.ask("GET", f"/v1/runs/{RUN}/versions")
    return Played(run, rounds, versions, version, progress["n_wasted"], elapsed)


def shared_out(folder: Path) -> list[Path]:
    """The bundled questions by subject, an equal part for each device: no two know anything of the same thing."""
    from fwdllama.cli.demo import bundled

    whole = json.loads(bundled("almanac-train.json").read_text())
    articles, paths = whole["data"], []
    for i in range(N_DEVICES):
        part = articles[i * len(articles) // N_DEVICES : (i + 1) * len(articles) // N_DEVICES]
        paths.append(folder / f"device-{i}.json")
        paths[-1].write_text(json.dumps({**whole, "data": part}))
    return paths


def _device(stage: Stage, troupe: Troupe, i: int, shard: Path, served: dict[str, Any]) -> Player:
    place = stage.folder / f"device-{i}"
    options = ("--token", served["token"], "--model", stage.model, "--data", shard, "--folder", place, "--name", place.name)
    return troupe.play(stage.folder / f"device-{i}.log", "join", served["url"], *options, "--threads", stage.threads, "--min-battery", 0)


def _watched(stage: Stage, admin: a.Administrator, watch: Watch, devices: list[Player]) -> float:
    """Watch until the run is over or its time is; returns when training began, by the monotonic clock."""
    began, shown = time.monotonic(), 0
    while True:
        progress = admin.ask("GET", f"/v1/runs/{RUN}/progress")
        for row in admin.ask("GET", f"/v1/runs/{RUN}/rounds", params={"from": shown}):
            shown = row["round"] + 1
            watch.closed(row)
        watch.progress(progress, time.monotonic() - began)
        if progress["status"] == "finished":
            return began
        for device in devices:
            if device.process.poll():
                raise device.failure()
        if time.monotonic() - began > stage.seconds:
            admin.ask("POST", f"/v1/runs/{RUN}/finish")
        time.sleep(POLL_S)


def conclude(stage: Stage, played: Played, eval_limit: int | None, *, as_json: bool) -> None:
    """Score the adapter, write the report, and say what to do next."""
    from rich.console import Console

    from fwdllama.cli.demo import bundled
    from fwdllama.cli.scores import chosen, score, side_by_side, table
    from fwdllama.cli.summary import adapter_facts
    from fwdllama.config import make_config
    from fwdllama.formats import clock, number, size
    from fwdllama.material import Source
    from fwdllama.models import resolve
    from fwdllama.report import RunSummary, write_report
    from fwdllama.surroundings import environment

    config, path = make_config(played.run["spec"]["train"]), stage.folder / ADAPTER
    questions = Source(bundled("almanac-dev.json"), "squad", limit=eval_limit).load()
    found = score(resolve(stage.model), path, questions, config)
    adapter = adapter_facts(path)
    steps = next_commands(stage)
    summary = RunSummary(
        title=f"{stage.model} trained by {N_DEVICES} devices",
        when=datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0"),
        metrics=metrics(played),
        config=played.run["spec"],
        environment=environment(),
        scores_before=found.before,
        scores_after=found.after,
        examples=chosen(found),
        adapter=adapter,
        next_commands=steps,
    )
    write_report(summary, stage.folder / REPORT)
    n_probes = sum(row["n_probes"] for row in played.rounds)
    if as_json:
        facts = {
            "run": RUN,
            "version": played.version,
            "rounds": len(played.rounds),
            "probes": n_probes,
            "wasted": played.n_wasted,
            "elapsed_s": played.elapsed_s,
            "theta_digest": played.versions[played.version]["theta_digest"],
            "adapter": {"path": adapter.path, "sha256": adapter.digest.removeprefix("sha256:"), "scope": adapter.scope},
            "scores": {"n_questions": len(questions.examples), "before": dict(found.before), "after": dict(found.after)},
            "report": str(stage.folder / REPORT),
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    console.print(side_by_side(chosen(found, N_SHOWN)))
    console.print(table(found))
    best = next((v["held_out_loss"] for v in played.versions if v["version"] == played.version), None)
    scored = "" if best is None else f", held-out loss {number(best)} on the devices"
    trained = f"{len(played.rounds)} rounds, {n_probes:,} probes by {N_DEVICES} devices, {clock(played.elapsed_s)}; version {played.version}{scored}"
    for name, text in (
        ("trained", trained),
        ("adapter", f"{adapter.path} ({size(adapter.size_bytes)}, scope {adapter.scope})"),
        ("report", str(stage.folder / REPORT)),
    ):
        typer.echo(f"{name:8} {text}")
    typer.echo("next:", err=True)
    for purpose, line in steps:
        typer.echo(f"  {purpose}:\n    {line}", err=True)


def metrics(played: Played) -> list[dict[str, Any]]:
    """Rounds as the rows that a report is made of."""
    losses = {version["version"]: version["held_out_loss"] for version in played.versions}
    began = min((row["closed_at"] - (row["duration_s"] or 0.0) for row in played.rounds), default=0.0)
    return [
        {
            "step": row["round"],
            "elapsed_s": row["closed_at"] - began,
            "n_probes": row["n_probes"],
            "n_probes_gate": row["n_wanted"],
            "loss": row["loss"],
            "held_out_loss": losses.get(row["round"] + 1),
            "projected_gradient_rms": row["gradient_rms"],
            "lr": row["lr"],
        }
        for row in played.rounds
    ]


def next_commands(stage: Stage) -> tuple[tuple[str, str], ...]:
    """What one would do now."""
    aggregator, adapter, model = (shlex.quote(str(x)) for x in (stage.folder / AGGREGATOR, stage.folder / ADAPTER, stage.model))
    return (
        ("ask one question, with the adapter and without", f"fwdllama answer --model {model} --adapter {adapter} --context TEXT --question TEXT"),
        ("serve it to any OpenAI client", f"fwdllama serve-model --model {model} --adapter {adapter}"),
        ("look at the run again", f"fwdllama serve {aggregator}"),
        ("the same with your own devices", "fwdllama serve, fwdllama run create, and fwdllama join on each device"),
    )
