"""`fwdllama join` turns this machine into a device of an aggregator."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fwdllama.cli import budget
from fwdllama.cli import device as d
from fwdllama.cli import options as o
from fwdllama.errors import UsageError

if TYPE_CHECKING:
    from fwdllama.federation.work import Workplace
    from fwdllama.guard import Guard

DEVICE = "The device"
ENGINE_SETTINGS = ("threads", "kv_type", "mmap", "repack", "n_batch", "together", "gpu_layers", "trunk", "stage_layers", "states", "keep_prompts")
INTERRUPTED = 130
TICK_S = 0.2


def register(app: typer.Typer) -> None:
    """Add `join`."""

    @app.command("join", cls=o.Command)
    def join_command(
        context: typer.Context,
        url: Annotated[str, typer.Argument(help="The aggregator's address, such as https://example.org or http://192.168.1.5:8080.", metavar="URL")],
        model: o.Model,
        data: o.Data,
        token: Annotated[
            str | None,
            typer.Option(
                help="Enrolment token, needed once.", metavar="TOKEN", envvar="FWDLLAMA_TOKEN", rich_help_panel=DEVICE, show_default=False
            ),
        ] = None,
        token_file: Annotated[Path | None, o.option(DEVICE, "A file with the enrolment token.", metavar="FILE")] = None,
        run: Annotated[
            str | None, o.option(DEVICE, "The run to work for.", "the only one that is for this model", metavar="NAME")
        ] = None,
        name: Annotated[str | None, o.option(DEVICE, "What the operator sees.", "this machine's name", metavar="NAME")] = None,
        folder: Annotated[
            Path | None,
            o.option(DEVICE, "Where the device keeps its key and its work.", "one in your home for each aggregator", metavar="FOLDER"),
        ] = None,
        ca_file: Annotated[Path | None, o.option(DEVICE, "Certificates to trust instead of the system's.", metavar="FILE.pem")] = None,
        once: Annotated[bool, typer.Option("--once", help="End after one task.", rich_help_panel=DEVICE)] = False,
        min_battery: d.MinBattery = None,
        only_charging: d.OnlyCharging = None,
        max_temperature: d.MaxTemperature = None,
        kind: o.Kind = "auto",
        labels: o.Labels = None,
        limit: Annotated[int | None, o.option(o.DATA, "Use only the first N examples.", "all", metavar="N", min=1)] = None,
        preset: d.Preset = None,
        threads: o.Threads = None,
        kv_type: o.KvType = None,
        mmap: o.Mmap = None,
        repack: o.Repack = None,
        n_batch: o.NBatch = None,
        together: o.Together = None,
        nice: d.Nice = None,
        gpu_layers: o.GpuLayers = None,
        trunk: o.Trunk = None,
        stage_layers: o.StageLayers = None,
        states: o.States = None,
        memory_budget: o.MemoryBudget = None,
        keep_prompts: o.KeepPrompts = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line for whatever happens.")] = False,
    ) -> None:
        """Work for an aggregator with your own data, which stays here: losses are all that is sent.

        Ctrl-C stops, and the same command goes on. A lost network, sleep and restarts cost at most the task in progress.
        """
        from fwdllama.federation.connection import checked_url, read_token
        from fwdllama.federation.work import Workplace
        from fwdllama.material import Source
        from fwdllama.models import resolve

        if token is not None and token_file is not None:
            raise UsageError("--token (or FWDLLAMA_TOKEN) and --token-file were both given; give one.")
        secret = read_token(token_file) if token_file is not None else token
        wanted = Wanted(checked_url(url), secret, (name or platform.node() or "device")[:64], run, folder, ca_file, once)
        given = d.completed(context.params)
        guard = d.guard_of(given)
        settings = {key: given[key] for key in ENGINE_SETTINGS if given[key] is not None}
        chosen = o.configuration(settings).engine  # refuses what cannot be
        fields = [o.SETTINGS[key].removeprefix("engine.") for key in settings]
        engine = {field: getattr(chosen, field) for field in fields}
        source = Source(data, None if kind == "auto" else kind, o.label_words(labels), limit)
        memory = None if given["memory_budget"] is None else budget.memory_size(given["memory_budget"])
        place = Workplace(resolve(model), source, engine, memory, budget.kept(context.params))
        with d.considerate(given, lambda text: typer.echo(text, err=True)):
            ended = take_part(wanted, place, guard, as_json=as_json)
        if ended == "stopped":
            raise typer.Exit(INTERRUPTED)


@dataclass(frozen=True)
class Wanted:
    """Which aggregator a device works for, and as what."""

    url: str
    token: str | None
    name: str
    run: str | None
    folder: Path | None
    ca_file: Path | None
    once: bool


def take_part(wanted: Wanted, place: Workplace, guard: Guard, *, as_json: bool) -> str:
    """Be a device until the run is finished, or Ctrl-C; returns why it ended.

    Raises:
        FwdllamaError: anything that a user can mend.
    """
    from fwdllama.cli.interrupt import Interrupt
    from fwdllama.cli.watch import Watch
    from fwdllama.federation.client import Client
    from fwdllama.federation.connection import connection, unprotected
    from fwdllama.federation.device import Device, Listener, Status
    from fwdllama.federation.identity import Identity
    from fwdllama.federation.store import FolderStore, default_folder
    from fwdllama.hooks import Hooks
    from fwdllama.models import default_cache_dir
    from gguf_tools.model import file_sha256

    n_examples = len(place.source.load().examples)  # a mistake in the file is told before anybody is asked
    base = file_sha256(place.model, default_cache_dir())
    folder = wanted.folder or default_folder(wanted.url)
    with connection(wanted.ca_file) as http, FolderStore(folder) as store, Watch(as_json=as_json) as watch, Interrupt(watch.event) as interrupt:

        def sleep(seconds: float) -> bool:
            end = time.monotonic() + seconds
            while not interrupt.requested and (left := end - time.monotonic()) > 0:
                time.sleep(min(TICK_S, left))
                watch.tick()
            return not interrupt.requested

        def status(at: Status) -> None:
            interrupt.armed = at.doing != "loading"  # nothing is lost by ending there, and it may take long
            watch.status(at)

        if unprotected(wanted.url):
            watch.event(f"{wanted.url} is not encrypted: whoever listens on the way can read the token and the losses; https:// prevents it")
        client = Client(wanted.url, http, Identity.load(store, wanted.url), sleep=sleep)
        place = replace(place, hooks=Hooks(on_event=watch.event, on_staged=watch.staged, stop=interrupt.stop))
        listener = Listener(watch.event, status, interrupt.stop, sleep)
        device = Device(client, store, base, n_examples, place.hired, run_name=wanted.run, guard=guard, listener=listener, once=wanted.once)
        with device:
            device.enrol(wanted.name, wanted.token)
            ended = device.run()
        watch.event(ended)
        return ended
