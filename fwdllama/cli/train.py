"""`fwdllama train` starts a run, `fwdllama resume` goes on with one; both end in `summary.conclude`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwdllama.cli import device as d
from fwdllama.cli import options as o
from fwdllama.cli.budget import kept as kept_of
from fwdllama.cli.budget import memory_size
from fwdllama.cli.summary import Wanted, check_output, conclude
from fwdllama.errors import ResourceError, UsageError
from fwdllama.types import Dataset

if TYPE_CHECKING:
    from fwdllama.config import BudgetConfig, TrainConfig
    from fwdllama.progress import Progress
    from fwdllama.rest import Rest
    from fwdllama.setting import Change
    from fwdllama.training import Hooks, Outcome

RESULT = "At the end"

EvalData = Annotated[
    Path | None,
    o.option(
        RESULT,
        "Questions to score before and after: exact match and F1, or accuracy. They choose nothing: the held-out loss "
        "is of paragraphs kept out of --data.",
        metavar="FILE",
    ),
]
EvalLimit = Annotated[int | None, o.option(RESULT, "Ask only the first N of them.", "all", metavar="N", min=1)]
Report = Annotated[Path | None, o.option(RESULT, "Write a report with plots to this file.", metavar="FILE.html")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=RESULT)]


def register(app: typer.Typer) -> None:
    """Add `train` and `resume`."""

    @app.command("train", cls=o.Command)
    def train_command(
        context: typer.Context,
        model: o.Model,
        data: o.Data,
        out: Annotated[Path, o.option(o.FILES, "Where the adapter goes, a GGUF file.", metavar="FILE.gguf")],
        run: Annotated[
            Path | None,
            o.option(o.FILES, "Run directory, from which training can be resumed.", "next to --out", metavar="FOLDER"),
        ] = None,
        kind: o.Kind = "auto",
        labels: o.Labels = None,
        template: o.Template = None,
        modules: o.Modules = None,
        layers: o.Layers = None,
        from_layer: o.FromLayer = None,
        rank: o.Rank = None,
        alpha: o.Alpha = None,
        train: o.Train = None,
        init: o.Init = None,
        scope: o.Scope = None,
        examples_per_probe: o.ExamplesPerProbe = None,
        sided: o.Sided = None,
        rounds: o.Rounds = None,
        first_rounds: o.FirstRounds = None,
        eps: o.Eps = None,
        outlier: o.Outlier = None,
        example_clip: o.ExampleClip = None,
        objective: o.Objective = None,
        vocabulary: o.Vocabulary = None,
        pacing: o.Pacing = None,
        tau: o.Tau = None,
        lr: o.Lr = None,
        half_life: o.HalfLife = None,
        warmup: o.Warmup = None,
        candidates: o.Candidates = None,
        accept: o.Accept = None,
        units: o.Units = None,
        per_unit: o.PerUnit = None,
        fresh: o.Fresh = None,
        held_out: o.HeldOut = None,
        ctx: o.Ctx = None,
        seconds: o.Seconds = None,
        steps: o.Steps = None,
        probes: o.Probes = None,
        patience: o.Patience = None,
        seed: o.Seed = None,
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
        min_battery: d.MinBattery = None,
        only_charging: d.OnlyCharging = None,
        max_temperature: d.MaxTemperature = None,
        eval_data: EvalData = None,
        eval_limit: EvalLimit = None,
        report: Report = None,
        as_json: Json = False,
    ) -> None:
        """Fine-tune a model on a data file, with forward passes only, and write an adapter.

        Every step is recorded in the run directory: Ctrl-C stops and loses nothing, and `fwdllama resume` goes on. On a low
        battery it rests, in heat it works a part of the time; neither counts as seconds of training.
        """
        words = o.label_words(labels)
        wanted = Wanted(_questions(eval_data, eval_limit, kind, words), report, as_json)
        start(d.completed(context.params), model, data, out, run, words, wanted, kept=kept_of(context.params))

    @app.command("resume")
    def resume_command(
        context: typer.Context,
        run: Annotated[Path, typer.Argument(help="Run directory of an earlier training.")],
        seconds: Annotated[float | None, _more("seconds of training", "S")] = None,
        steps: Annotated[int | None, _more("steps", "N")] = None,
        probes: Annotated[int | None, _more("probes", "N")] = None,
        out: Annotated[
            Path | None, o.option(o.FILES, "Where the adapter goes.", "where the run was told", metavar="FILE.gguf")
        ] = None,
        nice: d.Nice = None,
        min_battery: d.MinBattery = None,
        only_charging: d.OnlyCharging = None,
        max_temperature: d.MaxTemperature = None,
        eval_data: EvalData = None,
        eval_limit: EvalLimit = None,
        report: Report = None,
        as_json: Json = False,
    ) -> None:
        """Go on with a run that was stopped or killed, to the result it would have had, or train a finished one on.

        Limits and priority are those that it was started with, unless others are given.
        """
        from fwdllama import training
        from fwdllama.checkpoint import read_facts

        facts = read_facts(run)
        for path in (out, report):
            if path is not None:
                check_output(path)
        how = facts["source"]
        wanted = Wanted(_questions(eval_data, eval_limit, how["kind"], how["labels"]), report, as_json)
        budget, more = _budget(run, seconds, steps, probes)
        given = {**facts.get("device", {}), **d.kept(context.params)}
        with stoppable(run, budget, given) as (hooks, rest):
            outcome = training.resume(run, hooks, out=out, budget=more)
        end(run, outcome, wanted, rest.ended)


def start(
    given: dict[str, Any],
    model: str,
    data: Path,
    out: Path,
    run: Path | None,
    labels: dict[str, str] | None,
    wanted: Wanted,
    *,
    kept: Collection[Change] = (),
) -> None:
    """Train from the options `given`, by parameter name, and conclude; `run` None puts the run directory beside `out`.

    A memory budget changes nothing of what is `kept`.

    Raises:
        FwdllamaError: anything that a user can mend.
        FileError: the model's file is unfit.
        Exit: it was interrupted.
    """
    from fwdllama import training
    from fwdllama.models import resolve

    config = o.configuration(given)
    for path in (out, wanted.report):
        if path is not None:
            check_output(path)
    kind = given.get("kind", "auto")
    source = training.Source(data, None if kind == "auto" else kind, labels)
    path = resolve(model)
    run_path = run or out.with_name(f"{out.stem}-run")
    if given.get("from_layer") is not None:
        config = _from_layer(config, path, given)
    with stoppable(run_path, config.budget, given) as (hooks, rest):
        if given.get("memory_budget") is not None:
            from fwdllama.fitting import fitted

            limit = memory_size(given["memory_budget"])
            config = fitted(config, path, source, limit, kept=kept, on_event=hooks.on_event)
        outcome = training.train(config, path, source, run_path, out, hooks)
    end(run_path, outcome, wanted, rest.ended)


def _from_layer(config: TrainConfig, model: Path, given: dict[str, Any]) -> TrainConfig:
    from fwdllama.config import layer_band
    from fwdllama.setting import layers_from
    from gguf_tools.model import read_model_info

    if given.get("layers") is not None:
        raise UsageError("--layers and --from-layer were both given; give one.")
    info = read_model_info(model)
    layers = layers_from(info, given["from_layer"], layer_band(info.n_layers))
    return config.model_copy(update={"space": config.space.model_copy(update={"layers": layers})})


def end(run_path: Path, outcome: Outcome, wanted: Wanted, forbidden: str | None) -> None:
    """Conclude; an interrupted run ends the program as Ctrl-C does, one that the device forbids is a failure.

    Raises:
        ResourceError: it was `forbidden`.
        Exit: it was interrupted.
    """
    conclude(run_path, outcome, wanted)
    if outcome.adapter is None and forbidden is not None:
        raise ResourceError(f"{forbidden}, so training stopped before the system would have ended it. Close other programs, then go on as above.")
    if outcome.adapter is None:
        raise typer.Exit(130)


@contextmanager
def stoppable(run_path: Path, budget: BudgetConfig, given: Mapping[str, Any]) -> Iterator[tuple[Hooks, Rest]]:
    """Hooks that show a run on stderr, stop it at Ctrl-C, and let the device rest; what ends it at once says how to go on."""
    from fwdllama.cli.interrupt import Interrupt
    from fwdllama.cli.live import Display
    from fwdllama.rest import Rest
    from fwdllama.training import Hooks

    guard = d.guard_of(given)
    with Display(budget) as display, Interrupt(display.event) as interrupt, d.considerate(given, display.event):
        rest = Rest(guard, interrupt.stop, display.event, display.rest)

        def progress(at: Progress) -> None:
            interrupt.armed = True
            display.progress(at)

        try:
            stop = lambda: rest.ended is not None or interrupt.stop()  # noqa: E731
            yield Hooks(display.event, progress, display.staged, stop, rest, d.kept(given)), rest
        except KeyboardInterrupt:
            if (run_path / "run.json").exists():
                display.event(f"ended; go on from the last whole step with: fwdllama resume {run_path}")
            raise


def _questions(path: Path | None, limit: int | None, kind: str | None, labels: dict[str, str] | None) -> Dataset | None:
    """Read before training, so that a mistake in the file costs no training."""
    if path is None:
        return None
    from fwdllama.training import Source

    return Source(path, None if kind in (None, "auto") else kind, labels, limit).load()  # type: ignore[arg-type]


def _more(what: str, metavar: str) -> Any:
    return o.option(o.BUDGET, f"Go on for so many {what} more than it has had.", "the rest", metavar=metavar)


def _budget(
    run_path: Path, seconds: float | None, steps: int | None, probes: int | None
) -> tuple[BudgetConfig, dict[str, Any] | None]:
    """The budget of a resumed run, and what of it is new; a new one replaces the old one altogether."""
    from fwdllama.checkpoint import RunDirectory
    from fwdllama.config import read_config

    config = read_config(run_path / "config.json")
    if seconds is None and steps is None and probes is None:
        return config.budget, None
    with RunDirectory.open(run_path) as opened:
        state = opened.state
    more = {
        "seconds": None if seconds is None else state.elapsed_s + seconds,
        "steps": None if steps is None else state.step + steps,
        "probes": None if probes is None else state.n_probes + probes,
        "patience": None,
    }
    return o.configuration(more).budget, more
