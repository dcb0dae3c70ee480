"""`fwdllama doctor`: what this machine has of what training needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def register(app: typer.Typer) -> None:
    """Add `doctor`."""

    @app.command("doctor")
    def doctor_command(
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Check this machine, and say what to do about what is missing; the exit code is 1 where something is."""
        from fwdllama.doctor import diagnose

        checks = diagnose()
        if as_json:
            typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
        else:
            lines = Table(box=None, show_header=False, pad_edge=False)
            for check in checks:
                mark = Text("ok", style="green") if check.ok else Text("no", style="bold red")
                lines.add_row(mark, Text(check.name), Text(check.value))
                if check.advice:
                    lines.add_row("", "", Text(check.advice, style="italic"))
            Console().print(lines)
        if not all(check.ok for check in checks):
            raise typer.Exit(1)
