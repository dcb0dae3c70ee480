"""`fwdllama model`: the base models that are known by name, and fetching one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fwdllama.formats import size

if TYPE_CHECKING:
    from fwdllama.download import Progress


def register(app: typer.Typer) -> None:
    """Add `model fetch` and `model list`."""
    models = typer.Typer(help="Base models by name: fetch one, or list them.")

    @models.command("fetch")
    def fetch_command(
        name: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or hf:owner/repo/file.gguf.")],
        variant: Annotated[
            str | None,
            typer.Option(help="Quantisation, such as int4 or int8; default: what trains best.", metavar="NAME"),
        ] = None,
    ) -> None:
        """Download a model, verify it, and print where it is; what is there already is left alone."""
        from fwdllama.models import fetch

        with _shown() as report:
            path = fetch(name, variant=variant, progress=report)
        typer.echo(path)

    @models.command("list")
    def list_command(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Models that can be fetched by name, and those that were."""
        from fwdllama.models import list_models

        entries = list_models()
        if as_json:
            rows = [
                {
                    "name": entry.name,
                    "variants": list(entry.variants),
                    "size_bytes": entry.size_bytes,
                    "licence": entry.licence,
                    "fetched": {variant: str(path) for variant, path in entry.fetched.items()},
                }
                for entry in entries
            ]
            typer.echo(json.dumps(rows, indent=2))
            return
        lines = Table(box=None, pad_edge=False)
        for heading in ("model", "variants", "size", "licence", "fetched"):
            lines.add_column(heading)
        for entry in entries:
            fetched = ", ".join(entry.fetched) if entry.variants else "yes"
            cells = (entry.name, ", ".join(entry.variants), size(entry.size_bytes), entry.licence, fetched or "no")
            lines.add_row(*map(Text, cells))
        Console().print(lines)

    app.add_typer(models, name="model")


@contextmanager
def _shown() -> Iterator[Callable[[Progress], None]]:
    """What a fetch does, on stderr: a line for each thing, with a bar on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        last = ""

        def report(event: Progress) -> None:
            nonlocal last
            if event.text != last:
                console.print(Text(event.text), soft_wrap=True)
                last = event.text
            counted = event.total_bytes > 0
            bar.update(task, completed=event.done_bytes, total=event.total_bytes or None, visible=counted)

        yield report
