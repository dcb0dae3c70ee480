"""`fwdllama bench`: every item in turn, its result on disk before the next begins, and a table at the end.

Nothing is left out without a word: an item that cannot be measured here is a result that says why, one that crashes too, and
neither keeps the others from being measured. A missed bar is no failure of the command.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .measure import Bench, Item
    from .record import Record

MODEL = "smollm2-135m"


def all_items() -> tuple[Item, ...]:
    """What the bench measures, in this order: later items look at what earlier ones trained."""
    from . import backprop_race, costs, depth, directions, examples, large, paper, plan, prompts, runs, safety, scaling, speed
    from .federation import dropout, hostile, kill, load
    from .federation import training as together

    trained = (*runs.SQUAD_ITEMS, *backprop_race.ITEMS, *directions.ITEMS)
    costing = (*costs.ITEMS, *speed.ITEMS, *depth.ITEMS, *examples.ITEMS, prompts.ITEM, *plan.ITEMS, *safety.ITEMS, runs.DEMO_ITEM)
    federation = (*load.ITEMS, *kill.ITEMS, *dropout.ITEMS, *hostile.ITEMS, together.ITEM)
    return (*trained, *costing, *federation, *paper.ITEMS, *large.ITEMS, *scaling.ITEMS)


def register(app: typer.Typer, *, items: Sequence[Item] | None = None) -> None:
    """Add the command `bench` to an application, for the items given or all."""

    @app.command("bench")
    def bench_command(
        names: Annotated[
            list[str] | None, typer.Argument(metavar="[ITEM]...", help="What to measure; default: everything, see --list.")
        ] = None,
        data_dir: Annotated[
            Path | None,
            typer.Option(
                help="Folder of squad-train-4000.json.gz and squad-dev-sample.json.gz. Default: FWDLLAMA_DATA, or "
                "a sibling folder of the checkout."
            ),
        ] = None,
        model: Annotated[str, typer.Option(help="Base model, by name or path.", metavar="MODEL")] = MODEL,
        out: Annotated[
            Path,
            typer.Option(
                help="Results; kept and completed where it exists. Run directories go into a folder of this name without "
                ".json.",
                metavar="FILE.json",
            ),
        ] = Path("bench.json"),
        markdown: Annotated[Path | None, typer.Option(help="Write the table to this file too.", metavar="FILE.md")] = None,
        seconds_scale: Annotated[
            float, typer.Option(help="Times of training, for a trial of the bench; bars are for 1.", metavar="X")
        ] = 1.0,
        list_items: Annotated[bool, typer.Option("--list", help="Print what there is to measure, and end.")] = False,
    ) -> None:
        """Measure training against its bars: quality, speed, memory and safety, on this machine.

        Everything takes about two hours and a half on two cores. A result is written as soon as there is one.
        """
        from rich.console import Console

        from . import table
        from .measure import Bench, prepare_work
        from .record import Record, this_machine

        known = {item.name: item for item in (all_items() if items is None else items)}
        chosen = select(names or [], known)
        if list_items:
            for item in chosen:
                typer.echo(f"{item.name:26} {item.minutes:4g} min  {item.what}; {item.bar}")
            return
        check_options(out, markdown, seconds_scale)
        work = out.with_suffix("")
        record = Record(out, this_machine())
        prepare_work(work)
        bench = Bench(model, data_dir or default_data(os.environ), work, seconds_scale)
        typer.echo(f"{sum(item.minutes for item in chosen):.0f} minutes, if this machine has two cores", err=True)
        crashed = measure_all(chosen, bench, record)
        shown = sorted(record.results, key=lambda result: [*known, result["item"]].index(result["item"]))
        if markdown is not None:
            markdown.write_text(table.markdown(shown, known, record.machine), encoding="utf-8")
        Console().print(table.table(shown, known, record.machine))
        typer.echo(table.conclusion(shown))
        if crashed:
            raise typer.Exit(1)


def select(names: Sequence[str], known: Mapping[str, Item]) -> list[Item]:
    """The named items, or all, in the bench's own order.

    Raises:
        UsageError: there is no such item.
    """
    from fwdllama.errors import UsageError

    for name in names:
        if name not in known:
            raise UsageError(f"{name!r} is nothing that can be measured; choose from {', '.join(known)}.")
    return [item for item in known.values() if not names or item.name in names]


def check_options(out: Path, markdown: Path | None, seconds_scale: float) -> None:
    """Find out before hours of work that their result could not be saved.

    Raises:
        UsageError: a name or a scale that cannot be.
        ResourceError: a place that cannot be written.
    """
    from fwdllama.errors import UsageError

    from ..cli import check_writable

    if out.suffix != ".json":
        raise UsageError(f"--out is {out}, but must end in .json: run directories go into the folder of that name without it.")
    if not 0 < seconds_scale < float("inf"):
        raise UsageError(f"--seconds-scale is {seconds_scale}, but must be a positive number.")
    for path in (out, markdown):
        check_writable(path)


def default_data(environ: Mapping[str, str]) -> Path | None:
    """The folder that FWDLLAMA_DATA names, or the one beside the checkout that this runs from."""
    from .record import ROOT

    named = environ.get("FWDLLAMA_DATA")
    beside = ROOT.parent / "shared" / "data"
    if named:
        return Path(named)
    return Path(os.path.relpath(beside)) if beside.is_dir() else None  # relative, for the command lines in the results


def measure_all(items: Sequence[Item], bench: Bench, record: Record) -> bool:
    """Measure and record every item; whether one crashed."""
    from . import table

    crashed = False
    for item in items:
        typer.echo(f"{item.name}: {item.what}", err=True)
        result = measured(item, bench)
        record.add(result)
        crashed |= result["status"] == "crashed"
        typer.echo(f"{item.name}: {table.verdict(result)}: {table.summary(result, item)}", err=True)
    return crashed


def measured(item: Item, bench: Bench) -> dict[str, Any]:
    """The result of one item, whatever becomes of it."""
    from .record import commit

    result: dict[str, Any] = {
        "item": item.name,
        "what": item.what,
        "status": "skipped",
        "figures": {},
        "bar": item.bar,
        "met": False,
        "command": f"fwdllama bench {item.name}",
        "reason": item.lacking(bench),
        "began": time.strftime("%Y-%m-%d %H:%M:%S"),
        "took_s": 0.0,
        "load_average": [round(load, 2) for load in os.getloadavg()],  # before it: over 1, 5 and 15 minutes
        "seconds_scale": bench.scale,
        "commit": commit(),
    }
    if result["reason"] is not None:
        return result
    begun = time.monotonic()
    try:
        found = item.measure(bench)
    except Exception as error:  # noqa: BLE001 - an item must not take the others' results with it
        result |= {"status": "crashed", "reason": str(error) or type(error).__name__, "traceback": traceback.format_exc()}
    else:
        result |= {"status": "measured", "figures": dict(found.figures), "met": item.met(found.figures), "command": found.command}
    return result | {"took_s": round(time.monotonic() - begun, 1)}
