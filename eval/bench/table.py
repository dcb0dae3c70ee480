"""Results for people: a table on a terminal, the same in Markdown, and one plain sentence about the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fwdllama.formats import MISSING, size

from .measure import Item
from .record import Result

STYLES = {"met": "green", "missed": "yellow", "skipped": "dim", "crashed": "red"}


def verdict(result: Result) -> str:
    """met, missed, skipped or crashed."""
    if result["status"] == "measured":
        return "met" if result["met"] else "missed"
    return str(result["status"])


def shown(name: str, value: object) -> str:
    """A figure with its unit, which its name ends with.

    >>> shown("elapsed_s", 300.41), shown("f1", 46.2781), shown("peak_bytes", 98304), shown("identical", True)
    ('elapsed 300.4 s', 'f1 46.28', 'peak 96.0 KiB', 'identical: yes')
    """
    if isinstance(value, bool):
        return f"{name}: {'yes' if value else 'no'}"
    if not isinstance(value, int | float):
        return f"{name} {MISSING if value is None else value}"
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes')} {size(value)}"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    for unit in ("ms", "s"):
        if name.endswith(f"_{unit}"):
            return f"{name.removesuffix(f'_{unit}')} {text} {unit}"
    return f"{name} {text}"


def summary(result: Result, item: Item | None) -> str:
    """The figures that matter, or why there are none."""
    if result["status"] != "measured":
        return str(result["reason"]).splitlines()[0]
    figures: Mapping[str, Any] = result["figures"]
    names = item.shown if item else [name for name, value in figures.items() if isinstance(value, int | float)]
    return ", ".join(shown(name, figures.get(name)) for name in names)


def table(results: Sequence[Result], items: Mapping[str, Item], machine: Mapping[str, Any]) -> Table:
    """A row for each result."""
    lines = Table(title=heading(machine), title_justify="left", show_lines=True)
    lines.add_column("item", no_wrap=True)
    lines.add_column("measured", ratio=3)
    lines.add_column("bar", ratio=2)
    lines.add_column("")
    for result in results:
        word = verdict(result)
        cells = (result["item"], summary(result, items.get(result["item"])), result["bar"])
        lines.add_row(*map(Text, cells), Text(word, style=STYLES[word]))
    return lines


def markdown(results: Sequence[Result], items: Mapping[str, Item], machine: Mapping[str, Any]) -> str:
    """The same, to be put into a document."""
    rows = ["| item | what | measured | bar | |", "|---|---|---|---|---|"]
    for result in results:
        cells = (result["item"], result["what"], summary(result, items.get(result["item"])), result["bar"], verdict(result))
        rows.append(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([f"{heading(machine)}. Made by `fwdllama bench`.", "", *rows, "", conclusion(results), ""])


def heading(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return f"{machine['cpu']}, {machine['cores']} cores, {size(machine['memory_bytes'])} of memory"


def conclusion(results: Sequence[Result]) -> str:
    """How many bars are met and which are not, without a euphemism."""
    by_verdict: dict[str, list[str]] = {word: [] for word in STYLES}
    for result in results:
        by_verdict[verdict(result)].append(result["item"])
    n_measured = len(by_verdict["met"]) + len(by_verdict["missed"])
    parts = [f"{len(by_verdict['met'])} of {n_measured} measured items meet their bars"]
    parts += [f"{word}: {', '.join(names)}" for word, names in by_verdict.items() if names and word != "met"]
    scaled = sorted({result["seconds_scale"] for result in results} - {1.0})
    if scaled:
        parts.append("bars are for whole times, but some were scaled by " + ", ".join(f"{scale:g}" for scale in scaled))
    return "; ".join(parts) + "."
