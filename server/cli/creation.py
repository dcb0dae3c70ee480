"""`fwdllama run create`: found a run with the engine here, and hand it to the aggregator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fwdllama.cli import options as o
from fwdllama.errors import RunError, UsageError

from . import administrator as a

ROUND, SCORING, SERVER = "Rounds", "Scoring", "Aggregator"
DEFAULT_ROUNDS = 40
# Which field of a run each option is; those of its training are in `options.SETTINGS`.
FIELDS = {
    "round": {
        "probes_per_round": "probes",
        "most_probes_per_round": "most",
        "probes_per_task": "probes_per_task",
        "copies": "copies",
        "over_selection": "over_selection",
        "minimum": "minimum",
        "lease": "lease_s",
        "deadline": "deadline_s",
        "staleness": "staleness",
    },
    "aggregation": {"rule": "rule", "max_loss": "max_loss"},
    "evaluation": {"evaluate_every": "every", "evaluators": "devices", "run_patience": "patience"},
}


def register(group: typer.Typer) -> None:
    """Add `run create`."""

    @group.command("create", cls=o.Command)
    def create_command(
        context: typer.Context,
        name: Annotated[str, typer.Argument(help="Name of the run: letters, digits, '-', '_' and '.'.")],
        model: o.Model,
        data: Annotated[
            Path | None,
            o.option(o.FILES, "Public examples, to choose A and the distance of probes on.", "the bundled questions", metavar="FILE"),
        ] = None,
        kind: o.Kind = "auto",
        labels: o.Labels = None,
        template: o.Template = None,
        modules: o.Modules = None,
        layers: o.Layers = None,
        rank: o.Rank = None,
        alpha: o.Alpha = None,
        train: o.Train = None,
        init: o.Init = None,
        scope: o.Scope = None,
        examples_per_probe: o.ExamplesPerProbe = 4,
        sided: o.Sided = None,
        eps: o.Eps = None,
        outlier: o.Outlier = None,
        objective: o.Objective = None,
        pacing: o.Pacing = None,
        tau: o.Tau = None,
        lr: o.Lr = 0.05,
        half_life: o.HalfLife = 800,
        candidates: o.Candidates = None,
        units: o.Units = None,
        per_unit: o.PerUnit = None,
        fresh: o.Fresh = None,
        held_out: o.HeldOut = None,
        ctx: o.Ctx = None,
        steps: Annotated[int | None, o.option(o.BUDGET, "Rounds.", f"{DEFAULT_ROUNDS}", "--rounds", metavar="N", min=1)] = None,
        probes: o.Probes = None,
        run_patience: Annotated[
            int | None,
            o.option(o.BUDGET, "End after so many scored versions without a better one.", "never", "--patience", metavar="N", min=1),
        ] = None,
        probes_per_round: Annotated[int | None, o.option(ROUND, "Probes of a round.", "80", metavar="N", min=1)] = None,
        most_probes_per_round: Annotated[
            int | None, o.option(ROUND, "Never more, with --pacing variance.", "four times as many", metavar="N", min=1)
        ] = None,
        probes_per_task: Annotated[int | None, o.option(ROUND, "Probes that a device is given at once.", "20", metavar="N", min=1)] = None,
        copies: Annotated[int | None, o.option(ROUND, "Devices that are given the same probes.", "1", metavar="N", min=1)] = None,
        rule: Annotated[
            Literal["clip", "mean", "median", "trimmed"] | None,
            o.option(ROUND, "How results are merged; median and trimmed need 3 --copies.", "clip"),
        ] = None,
        over_selection: Annotated[float | None, o.option(ROUND, "Probes given out, times those wanted.", "1", metavar="X")] = None,
        minimum: Annotated[
            float | None, o.option(ROUND, "Share of its probes with which a round may close at its deadline.", "0.5", metavar="X")
        ] = None,
        lease: Annotated[float | None, o.option(ROUND, "Seconds after which a task is given to another device.", "120", metavar="S")] = None,
        deadline: Annotated[float | None, o.option(ROUND, "Seconds of a round.", "600", metavar="S")] = None,
        staleness: Annotated[int | None, o.option(ROUND, "Rounds by which a result may be late.", "0", metavar="N", min=0)] = None,
        max_loss: Annotated[float | None, o.option(ROUND, "Largest loss that is believed, nats per token.", "50", metavar="X")] = None,
        evaluate_every: Annotated[int | None, o.option(SCORING, "Score every so many versions.", "4", metavar="N", min=1)] = None,
        evaluators: Annotated[int | None, o.option(SCORING, "Devices that score one.", "4", metavar="N", min=1)] = None,
        public: Annotated[bool, typer.Option("--public", help="Serve its versions without a key.", rich_help_panel=SERVER)] = False,
        seed: o.Seed = None,
        threads: o.Threads = None,
        kv_type: o.KvType = None,
        mmap: o.Mmap = None,
        repack: o.Repack = None,
        gpu_layers: o.GpuLayers = None,
        trunk: o.Trunk = None,
        url: a.Url = a.DEFAULT_URL,
        key_file: a.KeyFile = None,
        as_json: a.Json = False,
    ) -> None:
        """Found a run: choose A and the distance of probes with the model here, upload the initial adapter, and open the first round."""
        from fwdllama.cli.demo import bundled
        from fwdllama.federation.founding import check_shape, found
        from fwdllama.hooks import Hooks
        from fwdllama.material import Source
        from fwdllama.models import resolve

        given = dict(context.params)
        if steps is None and probes is None:
            given["steps"] = DEFAULT_ROUNDS
        config = o.configuration(given)
        fields = {**_fields(given), "public": public}
        check_shape(config, name, **fields)
        source = Source(data, None if kind == "auto" else kind, o.label_words(labels)) if data else Source(bundled("almanac-train.json"), "squad")
        path = resolve(model)
        with a.administrator(url, key_file) as admin:
            # Before the engine works for a minute: whether the aggregator is there, knows the key, and has no such run.
            if admin.ask("GET", f"/v1/runs/{a.name(name)}", missing=True) is not None:
                raise RunError(f"{url}: there is a run {name!r} already.")
            spec, initial = found(config, path, source, name, Hooks(on_event=lambda text: typer.echo(text, err=True)), **fields)
            admin.ask("PUT", f"/v1/blobs/sha256:{spec.initial}", content=initial)
            made = admin.ask("POST", "/v1/runs", json=spec.model_dump(mode="json"))
        if as_json:
            typer.echo(json.dumps(made, indent=2))
            return
        typer.echo(made["run"])
        typer.echo(f"run {name} is open: {spec.n_params:,} numbers, eps {spec.eps:.3g}", err=True)
        typer.echo(f"enrol devices with what this says: fwdllama token create --url {url}", err=True)


def _fields(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a run's specification that options say; what was not given is left to its default there."""
    parts = {part: {field: given[name] for name, field in names.items() if given[name] is not None} for part, names in FIELDS.items()}
    rounds = parts["round"]
    if "probes" in rounds and "most" not in rounds:
        rounds["most"] = 4 * rounds["probes"]
    if "copies" not in rounds and parts["aggregation"].get("rule") in ("median", "trimmed"):
        raise UsageError(f"--rule {parts['aggregation']['rule']} compares devices that were given the same probes; give --copies of at least 3.")
    return parts
