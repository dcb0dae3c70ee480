"""`fwdllama bench-docs`: the benchmarks' document from results that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command `bench-docs` to an application."""

    @app.command("bench-docs")
    def docs_command(
        results: Annotated[Path, typer.Argument(help="Results of `fwdllama bench`.", metavar="FILE.json")] = Path("bench.json"),
        out: Annotated[
            Path, typer.Option(help="The document; its plots go into a folder of this name without .md.", metavar="FILE.md")
        ] = Path("docs/benchmarks.md"),
    ) -> None:
        """Write the benchmarks' document, tables and plots, from results that are there; nothing is measured."""
        from fwdllama.errors import UsageError

        from ..cli import check_writable
        from . import document
        from .cli import all_items
        from .record import read_results

        if out.suffix != ".md":
            raise UsageError(f"--out is {out}, but must end in .md: plots go into the folder of that name without it.")
        check_writable(out)
        known = {item.name: item for item in all_items()}
        found = read_results(results)
        shown = sorted(found["results"], key=lambda result: [*known, result["item"]].index(result["item"]))
        pictures = document.pictures_of(shown)
        document.write(document.document(shown, known, found["machine"], out.stem), pictures, out)
        typer.echo(f"{out}, with {len(pictures)} plots, from {len(shown)} results", err=True)
