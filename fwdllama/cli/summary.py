"""What a run leaves for its user: the scores, where the adapter is and where it works, a report, and what to do next.

Everything but the scores is read from the run directory, so that a new run, a resumed one and the demo end alike.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from fwdllama.errors import ResourceError
from fwdllama.types import Dataset

if TYPE_CHECKING:
    from fwdllama.cli.scores import Scores
    from fwdllama.config import TrainConfig
    from fwdllama.report import AdapterFacts
    from fwdllama.training import Outcome

Steps = tuple[tuple[str, str], ...]  # (purpose, command line)


@dataclass(frozen=True)
class Wanted:
    """What a user asked to have at the end: scores on a data set, a report, JSON, and answers side by side."""

    dataset: Dataset | None = None
    report: Path | None = None
    as_json: bool = False
    n_shown: int = 0


def check_output(path: Path) -> None:
    """Find out before the work that its result could not be saved, and make the folder that it will be in.

    Raises:
        ResourceError: the path is a folder, or cannot be written.
    """
    from fwdllama.surroundings import check_writable

    if path.is_dir():
        raise ResourceError(f"{path}: is a folder, but a file to write was expected.")
    check_writable(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{path.parent} cannot be made: {error.strerror or error}.") from error


def conclude(run_path: Path, outcome: Outcome, wanted: Wanted) -> None:
    """Score what was trained, and tell: results on stdout, advice on stderr.

    Raises:
        DataError: no question that was to be scored fits the model's context.
        ResourceError: the report cannot be written, or there is too little memory for scoring.
    """
    from fwdllama.checkpoint import read_facts
    from fwdllama.config import read_config

    facts, config = read_facts(run_path), read_config(run_path / "config.json")
    model = Path(facts["files"]["model"])
    if outcome.adapter is None:
        _tell_of_a_stop(run_path, outcome, wanted)
        return
    found = None
    if wanted.dataset is not None:
        from fwdllama.cli.scores import score

        found = score(model, outcome.adapter, wanted.dataset, config)
    adapter = adapter_facts(outcome.adapter)
    steps = next_commands(run_path, model, outcome.adapter, config, wanted.dataset)
    if wanted.report is not None:
        _write_report(run_path, facts, config, found, adapter, steps, wanted)
    if wanted.as_json:
        typer.echo(json.dumps(_as_json(run_path, outcome, found, adapter, wanted.report), indent=2))
    else:
        _tell(outcome, found, adapter, wanted)
    _advise(outcome, adapter, steps)


def _tell_of_a_stop(run_path: Path, outcome: Outcome, wanted: Wanted) -> None:
    if wanted.as_json:
        typer.echo(json.dumps(_as_json(run_path, outcome, None, None, None), indent=2))
    typer.echo(f"stopped after step {outcome.state.step}; everything up to there is in {run_path}.", err=True)
    typer.echo(f"go on with: {_line('fwdllama', 'resume', run_path)}", err=True)


def _tell(outcome: Outcome, found: Scores | None, adapter: AdapterFacts, wanted: Wanted) -> None:
    from fwdllama.formats import clock, number, size

    console = Console()
    if found is not None:
        from fwdllama.cli.scores import chosen, side_by_side, table

        if wanted.n_shown:
            console.print(side_by_side(chosen(found, wanted.n_shown)))
        console.print(table(found))
    state = outcome.state
    loss = "" if state.best_loss is None else f", held-out loss {number(state.best_loss)} at step {state.best_step}"
    trained = f"{state.step} steps, {state.n_probes:,} probes, {clock(state.elapsed_s)}{loss}"
    rows = [("trained", trained), ("adapter", f"{adapter.path} ({size(adapter.size_bytes)}, scope {adapter.scope})")]
    if wanted.report is not None:
        rows.append(("report", str(wanted.report)))
    for name, text in rows:
        typer.echo(f"{name:8} {text}")


def _advise(outcome: Outcome, adapter: AdapterFacts, steps: Steps) -> None:
    for reason, count in outcome.skipped.items():
        typer.echo(f"warning: {count} examples were left out: {reason}.", err=True)
    if outcome.state.best_step == 0 and outcome.state.best_loss is not None:
        text = "no step made the held-out loss lower, so the adapter is the untrained one; train longer or change --lr."
        typer.echo(f"warning: {text}", err=True)
    if adapter.warning:
        typer.echo(f"note: {adapter.warning}", err=True)
    typer.echo("next:", err=True)
    for purpose, line in steps:
        typer.echo(f"  {purpose}:\n    {line}", err=True)


def adapter_facts(path: Path) -> AdapterFacts:
    """Size, digest and scope of an adapter's file."""
    from fwdllama.report import AdapterFacts
    from gguf_tools.adapter import read_adapter

    raw = path.read_bytes()
    return AdapterFacts(str(path), len(raw), f"sha256:{hashlib.sha256(raw).hexdigest()}", read_adapter(path).scope)


def next_commands(run_path: Path, model: Path, adapter: Path, config: TrainConfig, dataset: Dataset | None) -> Steps:
    """What one would do now, as (purpose, command line)."""
    kind = dataset.kind if dataset is not None else "squad"
    asked: dict[str, tuple[str, ...]] = {
        "squad": ("--context", "TEXT", "--question", "TEXT"),
        "pairs": ("--prompt", "TEXT"),
        "classification": ("--text", "TEXT", "--labels", "WORD,WORD"),
    }
    files = ("--model", model, "--adapter", adapter)
    seconds = round(config.budget.seconds or 300)
    return (
        ("ask one question, with the adapter and without", _line("fwdllama", "answer", *files, *asked[kind])),
        ("score it on a data set", _line("fwdllama", "eval", *files, "--data", "FILE")),
        ("train on", _line("fwdllama", "resume", run_path, "--seconds", seconds)),
    )


def _line(*words: object) -> str:
    return " ".join(shlex.quote(_short(word) if isinstance(word, Path) else str(word)) for word in words)


def _short(path: Path) -> str:
    """As seen from here, where it lies below."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def _write_report(
    run_path: Path,
    facts: dict[str, Any],
    config: TrainConfig,
    found: Scores | None,
    adapter: AdapterFacts,
    steps: Steps,
    wanted: Wanted,
) -> None:
    from fwdllama.checkpoint import read_metrics
    from fwdllama.cli.scores import chosen
    from fwdllama.report import RunSummary, write_report

    assert wanted.report is not None
    model, data = (Path(facts["files"][name]) for name in ("model", "data"))
    summary = RunSummary(
        title=f"{model.stem} trained on {data.name}",
        when=datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0"),
        metrics=read_metrics(run_path),
        config={"model": str(model), "data": str(data), **config.model_dump()},
        environment=facts["environment"],
        scores_before=found.before if found else {},
        scores_after=found.after if found else {},
        examples=chosen(found) if found else (),
        adapter=adapter,
        next_commands=steps,
    )
    write_report(summary, wanted.report)


def _as_json(
    run_path: Path, outcome: Outcome, found: Scores | None, adapter: AdapterFacts | None, report: Path | None
) -> dict[str, Any]:
    """The object that `--json` prints."""
    from fwdllama.checkpoint import read_metrics

    state, rows = outcome.state, read_metrics(run_path)
    last = rows[-1] if rows else {}
    return {
        "run": str(run_path),
        "finished": state.finished,
        "steps": state.step,
        "probes": state.n_probes,
        "elapsed_s": state.elapsed_s,
        "decode_fraction": state.decode_s / state.elapsed_s if state.elapsed_s else None,
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        "eps": state.eps,
        "loss": last.get("loss"),
        "held_out_loss": state.best_loss,
        "best_step": state.best_step,
        "ledger_sha256": state.ledger,
        "skipped": dict(outcome.skipped),
        "adapter": None
        if adapter is None
        else {
            "path": adapter.path,
            "sha256": adapter.digest.removeprefix("sha256:"),
            "size_bytes": adapter.size_bytes,
            "scope": adapter.scope,
        },
        "scores": None
        if found is None
        else {
            "data": found.dataset.source,
            "n_questions": len(found.dataset.examples),
            "before": dict(found.before),
            "after": dict(found.after),
            "skipped": dict(found.skipped),
        },
        "report": str(report) if report is not None else None,
    }
