"""`fwdllama run`: the runs of an aggregator."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from . import administrator as a
from . import creation
from .export import export_command
from .listing import Columns, cell, show, when

Name = Annotated[str, typer.Argument(help="Name or id of the run.")]
COLUMNS: Columns = {
    "run": lambda r: r["spec"]["name"],
    "status": lambda r: r["status"],
    "version": lambda r: r["version"],
    "of": lambda r: r["spec"]["train"]["budget"]["steps"],
    "base": lambda r: r["spec"]["base"]["name"],
    "numbers": lambda r: f"{r['spec']['n_params']:,}",
    "ledger": lambda r: f"{r['ledger_bytes']:,} bytes",
    "why": lambda r: r["reason"],
}


def register(app: typer.Typer) -> None:
    """Add `run create`, `list`, `show`, `pause`, `resume`, `finish`, `rollback` and `export`."""
    group = typer.Typer(help="Runs of an aggregator: create, watch, steer, and export what they learned.")
    creation.register(group)

    @group.command("list")
    def list_command(url: a.Url = a.DEFAULT_URL, key_file: a.KeyFile = None, as_json: a.Json = False) -> None:
        """Runs, newest first."""
        with a.administrator(url, key_file) as admin:
            found = admin.ask("GET", "/v1/runs")
        show(found, COLUMNS, as_json=as_json, empty="there are no runs; make one with: fwdllama run create NAME --model M.gguf")

    @group.command("show")
    def show_command(run: Name, url: a.Url = a.DEFAULT_URL, key_file: a.KeyFile = None, as_json: a.Json = False) -> None:
        """Where a run is: its round, its best version, what was refused and wasted."""
        with a.administrator(url, key_file) as admin:
            path = f"/v1/runs/{a.name(run)}"
            about, progress = admin.ask("GET", path), admin.ask("GET", f"{path}/progress")
        if as_json:
            typer.echo(json.dumps({**about, "progress": progress}, indent=2))
            return
        lines: dict[str, Any] = {
            "run": f"{progress['run']} ({about['run']})",
            "status": about["status"] + (f": {about['reason']}" if about["reason"] else ""),
            "base": f"{about['spec']['base']['name']} (sha256:{about['spec']['base']['sha256'][:12]})",
            "version": progress["version"],
            "round": f"{progress['probes']} of {progress['wanted']} probes, {progress['leased']} given out",
            "deadline": when(progress["deadline"]),
            "best": None if progress["best_version"] is None else f"version {progress['best_version']}, held-out loss {progress['best_loss']:.4f}",
            "results": f"{progress['n_results']} accepted, {progress['n_refused']} refused",
            "probes": f"{progress['n_probes']} in the ledger, {progress['n_wasted']} wasted",
            "theta": about["theta_digest"],
        }
        for heading, value in lines.items():
            typer.echo(f"{heading:10} {cell(value)}")

    _act(group, "pause", "Give out no more tasks of a run; results that are under way still count.")
    _act(group, "resume", "Go on with a paused run.")
    _act(group, "finish", "End a run for good; its versions stay.")

    @group.command("rollback")
    def rollback_command(
        run: Name,
        version: Annotated[int, typer.Option(min=0, help="Version to go back to.")],
        url: a.Url = a.DEFAULT_URL,
        key_file: a.KeyFile = None,
        as_json: a.Json = False,
    ) -> None:
        """Go back to an earlier version. The ledger keeps everything, and version numbers go on."""
        with a.administrator(url, key_file) as admin:
            changed = admin.ask("POST", f"/v1/runs/{a.name(run)}/rollback", json={"version": version})
        _told(changed, as_json)

    @group.command("verify")
    def verify_command(
        run: Name,
        version: Annotated[int | None, typer.Option(min=0, help="Version to make again. Default: the latest.")] = None,
        url: a.Url = a.DEFAULT_URL,
        key_file: a.KeyFile = None,
        as_json: a.Json = False,
    ) -> None:
        """Replay a run's ledger on this machine, and compare with what the aggregator serves."""
        from .replay import replayed

        with a.administrator(url, key_file) as admin:
            found = replayed(admin, run, version)
        if as_json:
            typer.echo(json.dumps(asdict(found), indent=2))
        else:
            typer.echo(f"version {found.version} is the replay of {found.n_entries} entries, {found.n_probes:,} probes: theta {found.theta_digest}")

    group.command("export")(export_command)
    app.add_typer(group, name="run")


def _act(group: typer.Typer, act: str, help_: str) -> None:
    @group.command(act, help=help_)
    def command(run: Name, url: a.Url = a.DEFAULT_URL, key_file: a.KeyFile = None, as_json: a.Json = False) -> None:
        with a.administrator(url, key_file) as admin:
            changed = admin.ask("POST", f"/v1/runs/{a.name(run)}/{act}")
        _told(changed, as_json)


def _told(run: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(run, indent=2))
    else:
        why = f" ({run['reason']})" if run["reason"] else ""
        typer.echo(f"run {run['spec']['name']} is {run['status']}{why}, at version {run['version']}")
