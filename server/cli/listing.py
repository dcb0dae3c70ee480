"""What a command shows: JSON for programs, else a table on stdout with times, sizes and dashes as people read them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from fwdllama.formats import MISSING

Columns = Mapping[str, Callable[[Mapping[str, Any]], Any]]  # heading -> cell of an item


def show(items: Sequence[Mapping[str, Any]], columns: Columns, *, as_json: bool, empty: str) -> None:
    """Print items; `empty` is said on stderr where there are none."""
    if as_json:
        typer.echo(json.dumps(list(items), indent=2))
        return
    if not items:
        typer.echo(empty, err=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in columns:
        table.add_column(heading, no_wrap=True)
    for item in items:
        table.add_row(*(Text(cell(of(item))) for of in columns.values()))
    Console(width=None if sys.stdout.isatty() else 1000).print(table)  # nothing is cut off in a pipe


def cell(value: Any) -> str:
    """A value as text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def when(at: float | None) -> str | None:
    """A time in this machine's zone."""
    return None if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
