"""`docs/benchmarks.md` from the results of a bench: nothing in it that is a figure was typed.

The fixed text, in `eval/templates/benchmarks.md`, says what each table means; tables and plots come from the results, and what was not
measured is said to be missing. Which results are of which commit stands beside them, because items are measured one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from fwdllama.formats import MISSING, size
from fwdllama.picture import picture
from gguf_tools.output import replacing

from .drawings import drawn
from .measure import Item
from .record import Result
from .table import heading, markdown

TEMPLATES = Path(__file__).parents[1] / "templates"
MEMORY_7B = {"memory-7b-int4": "INT4", "memory-7b-int8": "INT8"}


def document(results: Sequence[Result], items: Mapping[str, Item], machine: Mapping[str, Any], folder: str) -> str:
    """The text of the document; its pictures lie in `folder`, which is beside it."""
    measured = {result["item"]: result["figures"] for result in results if result["status"] == "measured"}
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pictures = {name: f"![{figure.title}]({folder}/{name}.svg)" for name, figure in drawn(measured).items()}
    return environment.get_template("benchmarks.md").render(
        machine=machine,
        heading=heading(machine),
        versions=", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version),
        days=_span(sorted(result["began"][:10] for result in results)),
        commits=", ".join(dict.fromkeys(str(result["commit"]) for result in results)) or MISSING,
        pictures=pictures,
        papers={base.upper(): paper_table(measured[f"paper-{base}"]) for base in ("fp16", "int8", "int4") if f"paper-{base}" in measured},
        memory_7b=memory_table({name: measured[item] for item, name in MEMORY_7B.items() if item in measured}),
        everything=markdown(results, items, machine),
        measured=measured,
    )


def write(text: str, pictures: Mapping[str, str], out: Path) -> None:
    """Save the document and its pictures, in a folder of the document's name beside it; pictures of an earlier one go.

    Raises:
        FileError: it cannot be written there.
    """
    folder = out.with_suffix("")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.stem not in pictures:
            old.unlink()
    for name, svg in pictures.items():
        with replacing(folder / f"{name}.svg") as temporary:
            temporary.write_text(svg, encoding="utf-8")
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def pictures_of(results: Sequence[Result]) -> dict[str, str]:
    """SVG files by name, without ending."""
    measured = {result["item"]: result["figures"] for result in results if result["status"] == "measured"}
    return {name: picture(figure) for name, figure in drawn(measured).items()}


def _span(days: Sequence[str]) -> str:
    return MISSING if not days else days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of Markdown.

    >>> print(table_of(["a", "b"], [["1", "x|y"]]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _number(value: Any, digits: int = 0) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def _size(value: Any) -> str:
    return MISSING if value is None else size(value)


def paper_table(figures: Mapping[str, Any]) -> str:
    """The rows of one base."""
    losses = list(next(row["seconds_to"] for row in figures["rows"].values() if "seconds_to" in row))
    to_losses = [f"to loss {loss}: s (passes)" for loss in losses]
    head = ["training", "peak memory", "before training: s", *to_losses, "lowest loss", "F1", "exact match", "upload a round"]
    base = [_number(figures["base"][name], 1) for name in ("f1", "exact_match")]
    rows = [["none (the base)", MISSING, MISSING, *[MISSING] * len(losses), MISSING, *base, MISSING]]
    for name, row in figures["rows"].items():
        rows.append([name, *_paper_cells(row, losses)])
    return table_of(head, rows)


def _paper_cells(row: Mapping[str, Any], losses: Sequence[str]) -> list[str]:
    upload = _size(row["upload_bytes"])
    if row.get("upload_all_bytes"):
        upload += f" ({_size(row['upload_all_bytes'])} with A)"
    reached = []
    for loss in losses:
        seconds = row["seconds_to"][loss]
        never = f"not reached ({_number(row['passes'])})"
        reached.append(never if seconds is None else f"{_number(seconds)} ({_number(row['passes_to'][loss])})")
    costs = [_size(row["memory_bytes"]), _number(row.get("setup_s")), *reached]
    return [*costs, _number(row["best_loss"], 2), _number(row["f1"], 1), _number(row["exact_match"], 1), upload]


def memory_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Memory at LLaMA-7B's shape, in GB of 10^9 bytes as the paper has it; empty where nothing was measured."""

    def gb(value: Any) -> str:
        return _number(None if value is None else value / 1e9, 2)

    rows = [
        [
            name,
            gb(each["model_bytes"]),
            f"{gb(each['whole_bytes'])} (KV {each['kv_type']})",
            f"{gb(each['limit_bytes'])}, {each['limited_by']}",
            gb(each["staged_bytes"]),
            each["staged_options"],
            gb(each["eval_bytes"]),
            _number(each["ratio"], 3),
            f"{100 * each['plan_error']:.1f} %, {100 * each['staged_plan_error']:.1f} %",
        ]
        for name, each in figures.items()
    ]
    limit = "completed under a hard limit of, GB"
    head = ["base", "file, GB", "whole model, GB", limit, "staged, GB", "its options", "evaluating, GB", "training / evaluating", "plan off by"]
    return table_of(head, rows) if rows else ""
