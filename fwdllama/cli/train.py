"""`fwdllama train` starts a run, `fwdllama resume` goes on with one; both end in `summary.conclude`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwdllama.cli import options as o
from fwdllama.cli.summary import Wanted, check_output, conclude
from fwdllama.types import Dataset

if TYPE_CHECKING:
    from fwdllama.config import BudgetConfig
    from fwdllama.trainer import Progress
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
        rank: o.Rank = None,
        alpha: o.Alpha = None,
        train: o.Train = None,
        init: o.Init = None,
        scope: o.Scope = None,
        examples_per_probe: o.ExamplesPerProbe = None,
        sided: o.Sided = None,
        rounds: o.Rounds = None,
        eps: o.Eps = None,
        outlier: o.Outlier = None,
        objective: o.Objective = None,
        pacing: o.Pacing = None,
        tau: o.Tau = None,
        lr: o.Lr = None,
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
        threads: o.Threads = None,
        kv_type: o.KvType = None,
        mmap: o.Mmap = None,
        repack: o.Repack = None,
        gpu_layers: o.GpuLayers = None,
        trunk: o.Trunk = None,
        keep_prompts: o.KeepPrompts = None,
        eval_data: EvalData = None,
        eval_limit: EvalLimit = None,
        report: Report = None,
        as_json: Json = False,
    ) -> None:
        """Fine-tune a model on a data file, with forward passes only, and write an adapter.

        Every step is recorded in the run directory: Ctrl-C stops and loses nothing, and `fwdllama resume` goes on.
        """
        words = o.label_words(labels)
        wanted = Wanted(_questions(eval_data, eval_limit, kind, words), report, as_json)
        start(context.params, model, data, out, run, words, wanted)

    @app.command("resume")
    def resume_command(
        run: Annotated[Path, typer.Argument(help="Run directory of an earlier training.")],
        seconds: Annotated[float | None, _more("seconds of training", "S")] = None,
        steps: Annotated[int | None, _more("steps", "N")] = None,
        probes: Annotated[int | None, _more("probes", "N")] = None,
        out: Annotated[
            Path | None, o.option(o.FILES, "Where the adapter goes.", "where the run was told", metavar="FILE.gguf")
        ] = None,
        eval_data: EvalData = None,
        eval_limit: EvalLimit = None,
        report: Report = None,
        as_json: Json = False,
    ) -> None:
        """Go on with a run that was stopped or killed, to the result it would have had, or train a finished one on."""
        from fwdllama import training
        from fwdllama.checkpoint import read_facts

        facts = read_facts(run)
        for path in (out, report):
            if path is not None:
                check_output(path)
        how = facts["source"]
        wanted = Wanted(_questions(eval_data, eval_limit, how["kind"], how["labels"]), report, as_json)
        budget, more = _budget(run, seconds, steps, probes)
        with stoppable(run, budget) as hooks:
            outcome = training.resume(run, hooks, out=out, budget=more)
        end(run, outcome, wanted)


def start(
    given: dict[str, Any],
    model: str,
    data: Path,
    out: Path,
    run: Path | None,
    labels: dict[str, str] | None,
    wanted: Wanted,
) -> None:
    """Train from the options `given`, by parameter name, and conclude; `run` None puts the run directory beside `out`.

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
    with stoppable(run_path, config.budget) as hooks:
        outcome = training.train(config, path, source, run_path, out, hooks)
    end(run_path, outcome, wanted)


def end(run_path: Path, outcome: Outcome, wanted: Wanted) -> None:
    """Conclude; an interrupted run ends the program as Ctrl-C does."""
    conclude(run_path, outcome, wanted)
    if outcome.adapter is None:
        raise typer.Exit(130)


@contextmanager
def stoppable(run_path: Path, budget: BudgetConfig) -> Iterator[Hooks]:
    """Hooks that show a run on stderr and stop it at Ctrl-C; what ends it at once says how to go on."""
    from fwdllama.cli.interrupt import Interrupt
    from fwdllama.cli.live import Display
    from fwdllama.training import Hooks

    with Display(budget) as display, Interrupt(display.event) as interrupt:

        def progress(at: Progress) -> None:
            interrupt.armed = True
            display.progress(at)

        try:
            yield Hooks(display.event, progress, interrupt.stop)
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
