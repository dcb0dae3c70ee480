"""`fwdllama demo-local`: training alone, on a small model and bundled questions, in a few minutes.

The federated one is the aggregator's. This one is `train` with its options filled in; nothing here trains, scores or reports by itself.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import filelock
import typer

from fwdllama.cli import options as o
from fwdllama.errors import ModelError, ResourceError, RunError

MODEL = "smollm2-135m"
SECONDS = 200.0  # leaves more than two of the six minutes to answering, on two slow cores
N_SHOWN = 5
MARK = ".fwdllama-demo"
RUN, ADAPTER, REPORT = "run", "adapter.gguf", "report.html"


def register(app: typer.Typer) -> None:
    """Add `demo-local`."""

    @app.command("demo-local", cls=o.Command)
    def demo_command(
        folder: Annotated[
            Path, typer.Option(help="Where its files go; an earlier demo there is replaced.", metavar="FOLDER")
        ] = Path("demo-local-run"),
        model: Annotated[str, typer.Option(help="Another model, by name or path.", metavar="MODEL")] = MODEL,
        seconds: Annotated[float, typer.Option(help="Seconds of training.", metavar="S")] = SECONDS,
        steps: o.Steps = None,
        eval_limit: Annotated[
            int | None, typer.Option(min=1, help="Ask only the first N held-out questions.", metavar="N")
        ] = None,
        threads: o.Threads = None,
        seed: o.Seed = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    ) -> None:
        """Fine-tune a small model on 400 bundled questions, and show what it answered before and after.

        Takes less than six minutes on two cores and writes an adapter and a report. Needs the model: `fwdllama model
        fetch smollm2-135m`.
        """
        from fwdllama.cli.summary import Wanted
        from fwdllama.cli.train import start
        from fwdllama.models import resolve
        from fwdllama.training import Source

        resolve(model)  # before an earlier demo is replaced
        given = {"seconds": seconds, "steps": steps, "threads": threads, "seed": seed, "kind": "squad"}
        o.configuration(given)
        fresh_folder(folder)
        questions = Source(bundled("almanac-dev.json"), "squad", limit=eval_limit).load()
        typer.echo(
            f"{model}: {seconds:.0f} seconds of training on bundled questions, then {len(questions.examples)} others "
            f"are asked before and after",
            err=True,
        )
        wanted = Wanted(questions, folder / REPORT, as_json, N_SHOWN)
        start(given, model, bundled("almanac-train.json"), folder / ADAPTER, folder / RUN, None, wanted)


def bundled(name: str) -> Path:
    """The path of a data file that comes with the package; resuming needs one that stays.

    Raises:
        ModelError: the package was installed as an archive, whose files have none.
    """
    path = Path(str(files("fwdllama") / "bundled" / name))
    if not path.is_file():
        raise ModelError(f"{path}: is not a file on disk; install fwdllama unpacked, as pip does.")
    return path


def fresh_folder(folder: Path, own: frozenset[str] = frozenset({RUN, ADAPTER, REPORT})) -> None:
    """Make the demo's folder, in the place of an earlier demo's if there is one; own: what an earlier one may have left there.

    Raises:
        RunError: it holds something else, or a demo that is going on.
        ResourceError: it cannot be made.
    """
    try:
        if folder.exists():
            _remove_earlier(folder, own)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
    except OSError as error:
        raise ResourceError(f"{folder} cannot be made the demo's folder: {error.strerror or error}.") from error


def _remove_earlier(folder: Path, own: frozenset[str]) -> None:
    if not folder.is_dir():
        raise RunError(f"{folder} is a file; name another --folder.")
    names = {entry.name for entry in folder.iterdir()}
    strangers = sorted(names - own - {MARK})
    if names and (strangers or MARK not in names):
        found = (strangers or sorted(names))[0]
        raise RunError(f"{folder} is not an earlier demo's ({found} is in it); name another --folder.")
    lock = folder / RUN / ".lock"
    if lock.exists():
        try:
            with filelock.FileLock(lock).acquire(timeout=0):
                pass
        except filelock.Timeout as error:
            raise RunError(f"{folder} is in use by a demo that is going on; name another --folder.") from error
    shutil.rmtree(folder)
